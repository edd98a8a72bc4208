// The key by which the server keeps this tab's talk over a reload; a tab of its own has a talk of its own.
() => {
  const draw = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  try {
    sessionStorage.doraVlTalk ??= draw();
    return [sessionStorage.doraVlTalk];
  } catch {
    return [draw()]; // a browser that stores nothing
  }
}
