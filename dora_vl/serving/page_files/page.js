// Copies an answer. And a dial asks again when its number is confirmed by Enter and when keys have moved its slider: by itself
// Gradio does so where the mouse lets go of it, or leaves it, alone.
() => {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.(".dv-copy");
    if (!button) return;
    const said = button.parentElement.previousElementSibling;
    const range = document.createRange();
    range.selectNodeContents(said);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    // Without https, but on this machine, browsers give pages no clipboard; the older way copies what is selected.
    if (navigator.clipboard) await navigator.clipboard.writeText(said.textContent); else document.execCommand("copy");
    getSelection().removeAllRanges();
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  const PAUSE = 300; // a key that is held moves the slider many times a second
  const in_dial = (event) => event.target.closest?.("#dv-strength-left, #dv-strength-right");
  const waiting = new Map();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.type === "number" && in_dial(event)) event.target.blur();
  });
  document.addEventListener("change", (event) => {
    const slider = event.target;
    if (slider.type !== "range" || !in_dial(event)) return;
    clearTimeout(waiting.get(slider));
    waiting.set(slider, setTimeout(() => slider.dispatchEvent(new PointerEvent("pointerup", {bubbles: true})), PAUSE));
  });
}
