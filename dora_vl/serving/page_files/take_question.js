// Takes the question from its box at Ask or Enter. What cannot be asked yet stays typed: while an answer is being made, Ask is
// grey. While the page begins, or a picture is still on its way to the server, the question waits for it.
async (question) => {
  const LONGEST = 120000, PACE = 25, DOUBLE_CLICK = 1000;
  const stays = {__type__: "update"};
  const ask = () => document.querySelector("#dv-ask");
  const page = (window.doraVl ??= {begun: false, taking: false, taken: 0});
  // What is being sent has a bar; what was sent is a row or a picture until the server has read it and empties the part.
  const ON_ITS_WAY = ["#dv-files progress", "#dv-files table"];
  const showing = () => document.querySelector(ON_ITS_WAY.join()) !== null;
  const again = !question.trim() && Date.now() - page.taken < DOUBLE_CLICK;
  if (page.taking || again || (page.begun && ask().disabled)) return [stays, stays];
  page.taking = true;
  try {
    const end = Date.now() + LONGEST;
    for (let free = 0; free < 2 && Date.now() < end; ) {
      page.begun ||= !ask().disabled;
      free = page.begun && !showing() ? free + 1 : 0;
      if (free < 2) await new Promise((go) => setTimeout(go, PACE));
    }
  } finally {
    page.taking = false;
    page.taken = Date.now();
  }
  return [`${page.taken} ${question}`, ""];
}
