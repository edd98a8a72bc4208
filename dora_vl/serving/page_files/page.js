// Copies an answer, refuses dropped folders, and makes a slider take effect when its number is confirmed by Enter or when
// keys have moved it: Gradio itself does so only where the mouse lets go of it, or leaves it.
() => {
  document.addEventListener("click", (event) => {
    if (!event.target.matches?.(".dv-copy")) return;
    getSelection().selectAllChildren(event.target.parentElement.previousElementSibling);
    event.target.textContent = document.execCommand("copy") ? "copied" : "not copied"; // navigator.clipboard wants https
    getSelection().empty();
  });
  document.addEventListener("drop", (event) => { // Gradio would read a folder as a file, and lose its connection
    const entries = [...(event.dataTransfer?.items ?? [])].map((item) => item.webkitGetAsEntry?.());
    if (!entries.some((entry) => entry?.isDirectory)) return;
    event.preventDefault();
    event.stopPropagation();
    alert("A folder cannot be dropped. Drop the files in it, or type the folder's path below.");
  }, true);
  const PAUSE = 300; // a key that is held moves the slider many times a second
  const in_slider = (event) => event.target.closest?.("#dv-strength-left, #dv-strength-right, #dv-rank, #dv-epochs");
  const waiting = new Map();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.type === "number" && in_slider(event)) event.target.blur();
  });
  document.addEventListener("change", (event) => {
    const slider = event.target;
    if (slider.type !== "range" || !in_slider(event)) return;
    clearTimeout(waiting.get(slider));
    waiting.set(slider, setTimeout(() => slider.dispatchEvent(new PointerEvent("pointerup", {bubbles: true})), PAUSE));
  });
}
