// Beside the pointer: the values of all lines at its step. The charts stand without it.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg"), tip = figure.querySelector(".tip");
  const [left, right] = data.box, lines = data.series;
  const of_x = (x) => left + (x - data.x[0]) / (data.x[1] - data.x[0]) * (right - left);
  const row = (text, colour) => {
    const line = document.createElement("div"), dot = document.createElement("span");
    if (colour !== undefined) { dot.className = `dot c${colour}`; line.append(dot); }
    line.append(text);
    return line;
  };
  const nearest = (items, distance) => items.reduce((best, item) => distance(item) < distance(best) ? item : best, items[0]);
  const rows = (x) => {
    if (!lines.length || x < left - 8 || x > right + 8) return [];
    const shown = lines.map((one) => ({ one, at: nearest([...one.x.keys()], (at) => Math.abs(of_x(one.x[at]) - x)) }));
    const step = nearest(shown.map(({ one, at }) => one.x[at]), (value) => Math.abs(of_x(value) - x));
    return [row(`step ${step}`), ...shown.map(({ one, at }) => row(`${one.name}: ${one.y[at]}`, one.colour))];
  };
  const show = (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    tip.replaceChildren(...rows((event.clientX - box.left) * scale));
    tip.style.visibility = tip.childElementCount ? "visible" : "hidden";
    const inside = figure.getBoundingClientRect(), place = event.clientX - inside.left + 14;
    tip.style.left = `${Math.max(0, Math.min(place, inside.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${event.clientY - inside.top + 14}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => { tip.style.visibility = "hidden"; });
}
// Which answers are shown: the right or the wrong ones, those of a kind, those with a word; all of them without a script.
for (const filter of document.querySelectorAll(".filter")) {
  const items = [...filter.nextElementSibling.children], buttons = [...filter.querySelectorAll("button")];
  const [word, kind] = ["input", "select"].map((name) => filter.querySelector(name));
  let chosen = items[0].dataset.is;
  const show = () => {
    for (const button of buttons) button.setAttribute("aria-pressed", button.value === chosen);
    for (const item of items) {
      item.hidden = (chosen && item.dataset.is !== chosen) || (kind?.value && item.dataset.kind !== kind.value)
        || !item.textContent.toLowerCase().includes(word.value.toLowerCase());
    }
    filter.querySelector("output").textContent = `${items.filter((item) => !item.hidden).length} shown`;
  };
  for (const button of buttons) button.addEventListener("click", () => { chosen = button.value; show(); });
  for (const part of [word, kind]) part?.addEventListener("input", show);
  filter.hidden = false;
  show();
}
