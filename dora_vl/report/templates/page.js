// The values of all lines at the pointer's step, beside the pointer. Without this script the page shows the same charts.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), tip = figure.querySelector(".tip");
  if (!data.series.length) continue;
  const [left, right] = [Number(svg.dataset.left), Number(svg.dataset.right)];
  const hide = () => { cursor.style.visibility = tip.style.visibility = "hidden"; };
  const show = (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const place = (event.clientX - box.left) * scale;
    if (place < left - 8 || place > right + 8) return hide();
    const x = data.x[0] + (place - left) / (right - left) * (data.x[1] - data.x[0]);
    const nearest = (one) => one.x.reduce((best, value, at) => Math.abs(value - x) < Math.abs(one.x[best] - x) ? at : best, 0);
    const found = data.series.map((one) => ({ name: one.name, colour: one.colour, at: nearest(one), one }));
    const shown = found.reduce((best, row) => Math.abs(row.one.x[row.at] - x) < Math.abs(best - x) ? row.one.x[row.at] : best, found[0].one.x[found[0].at]);
    const at = left + (shown - data.x[0]) / (data.x[1] - data.x[0]) * (right - left);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at);
    tip.replaceChildren();
    const head = document.createElement("div");
    head.textContent = `${data.label} ${shown}`;
    tip.append(head);
    for (const row of found) {
      const line = document.createElement("div"), dot = document.createElement("span");
      dot.className = `dot c${row.colour}`;
      line.append(dot, `${row.name}: ${row.one.y[row.at]}`);
      tip.append(line);
    }
    cursor.style.visibility = tip.style.visibility = "visible";
    const inside = figure.getBoundingClientRect(), x0 = event.clientX - inside.left;
    tip.style.left = `${Math.max(0, Math.min(x0 + 14, inside.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${event.clientY - inside.top + 14}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
