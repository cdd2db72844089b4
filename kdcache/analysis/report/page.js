"use strict";
document.documentElement.classList.add("js");
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

// Tables: a header sorts by its column, a second click turns the order; what is unknown stays last.
for (const table of all("table.sortable")) {
  all("thead th", table).forEach((header, column) => {
    header.firstChild.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const order = before ? (before === "descending" ? "ascending" : "descending") : column ? "descending" : "ascending";
      all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      for (const body of table.tBodies) {
        const value = (line) => line.cells[column].dataset.value;
        const lines = [...body.rows].sort((one, two) => {
          const [a, b] = [value(one), value(two)];
          if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
          return sign * (a - b);
        });
        body.append(...lines);
      }
    });
  });
}

// A table that is wider than the screen says so.
const wide = new ResizeObserver((entries) => {
  for (const { target } of entries) target.classList.toggle("wide", target.scrollWidth > target.clientWidth + 1);
});
all(".scroll").forEach((box) => wide.observe(box));

// Classes: the order of the cards; those without a value stay last.
byId("class-order")?.addEventListener("change", (event) => {
  const key = event.target.value;
  const sign = key === "gap" ? -1 : 1;
  for (const box of all(".classes")) {
    const value = (card) => (card.dataset[key] === undefined ? Infinity : sign * card.dataset[key]);
    box.append(...all(".class", box).sort((one, two) => value(one) - value(two) || one.dataset.place - two.dataset.place));
  }
});

// Charts: the pointer reads the nearest values; switches hide the lines of a row.
const MOST_READ = 8; // lines next to the pointer
const SVG = "http://www.w3.org/2000/svg";
const draw = (name, attributes) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const spaced = (...texts) => {
  const line = document.createElement("p");
  for (const text of texts) line.append(Object.assign(document.createElement("span"), { textContent: text }));
  return line;
};
for (const svg of all(".plot > svg")) {
  const [x0, x1, y0, y1] = JSON.parse(svg.dataset.frame);
  const [left, top, right, bottom] = JSON.parse(svg.dataset.box);
  const lines = all(".line", svg).map((group) => ({ group, points: JSON.parse(group.dataset.points) }));
  const cursor = svg.querySelector(".cursor");
  const readout = svg.parentElement.querySelector(".readout");
  const across = (x) => left + ((right - left) * (x - x0)) / (x1 - x0);
  const up = (y) => bottom - ((bottom - top) * (y - y0)) / (y1 - y0);
  const leave = () => { cursor.replaceChildren(); readout.hidden = true; };
  const read = (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const wanted = x0 + ((place - left) / (right - left)) * (x1 - x0);
    const shown = lines.filter(({ group }) => group.style.display !== "none");
    if (!shown.length) return leave();
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const high = ((event.clientY - box.top) / box.height) * svg.viewBox.baseVal.height;
    const far = ({ point }) => Math.abs(up(point[1]) - high);
    const every = shown.map(({ group, points }) => ({ group, point: nearest(points) }));
    const close = new Set([...every].sort((one, two) => far(one) - far(two)).slice(0, MOST_READ));
    const found = every.filter((one) => close.has(one));
    const step = found.map(({ point }) => point[0]).reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    cursor.replaceChildren(draw("line", { x1: across(step), x2: across(step), y1: top, y2: bottom }));
    const texts = [spaced(`${svg.dataset.x} ${step}`)];
    for (const { group, point } of found) {
      const dot = draw("circle", { cx: across(point[0]), cy: up(point[1]), r: 4.5 });
      dot.style.fill = getComputedStyle(group).getPropertyValue("--colour");
      cursor.append(dot);
      texts.push(spaced(group.dataset.name, `${point[1].toFixed(svg.dataset.digits)} ${svg.dataset.unit}`));
    }
    readout.replaceChildren(...texts);
    readout.hidden = false;
    const half = across(step) > (left + right) / 2;
    readout.style.left = half ? "auto" : `${(100 * (across(step) + 10)) / svg.viewBox.baseVal.width}%`;
    readout.style.right = half ? `${100 - (100 * (across(step) - 10)) / svg.viewBox.baseVal.width}%` : "auto";
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  svg.addEventListener("pointerleave", leave);
}
for (const box of all(".legend input")) {
  box.addEventListener("change", () => {
    for (const line of all(`.line.of-${box.dataset.place}`)) line.style.display = box.checked ? "" : "none";
  });
}

// Pictures: two layers, a line between them, marks, and only those images that have a class.
const stages = all(".stage");
const layer = (stage, key) => all(".layer", stage).find((one) => one.dataset.layer === key);
const choose = () => {
  const key = (side) => document.querySelector(`input[name="${side}"]:checked`)?.value;
  for (const stage of stages) {
    all(".layer", stage).forEach((one) => one.classList.remove("on", "on-left", "on-right"));
    for (const side of ["left", "right"]) {
      const chosen = layer(stage, key(side));
      chosen?.classList.add("on", `on-${side}`);
      stage.parentElement.querySelector(`.side-${side}`).textContent = chosen?.dataset.name ?? "";
    }
    tell(stage);
  }
};
const tell = (stage) => {
  const [left, right] = ["left", "right"].map((side) => stage.parentElement.querySelector(`.side-${side}`).textContent);
  const cut = Math.round(stage.cut ?? 50);
  const handle = stage.querySelector(".handle");
  handle.setAttribute("aria-valuenow", cut);
  handle.setAttribute("aria-valuetext", `${cut} % ${left}, ${100 - cut} % ${right}`);
};
const move = (stage, cut) => {
  stage.cut = Math.min(100, Math.max(0, cut));
  stage.style.setProperty("--cut", `${stage.cut}%`);
  tell(stage);
};
for (const stage of stages) {
  const follow = (event) => {
    const box = stage.getBoundingClientRect();
    move(stage, (100 * (event.clientX - box.left)) / box.width);
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => { if (stage.hasPointerCapture(event.pointerId)) follow(event); });
  stage.querySelector(".handle").addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    move(stage, (stage.cut ?? 50) + steps[event.key]);
  });
}
for (const radio of all(".tools input[type=radio]")) radio.addEventListener("change", choose);
for (const name of ["mark-wrong", "see-through"]) {
  const box = byId(name);
  const apply = () => all(".samples").forEach((one) => one.classList.toggle(name, box.checked));
  box?.addEventListener("change", apply);
  if (box) apply();
}
for (const button of all("#class-filter .pill-button")) {
  button.addEventListener("click", () => {
    const key = button.dataset.class;
    all("#class-filter .pill-button").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    const name = key === "" ? "mIoU" : `IoU of ${button.childNodes[1].textContent}`;
    let shown = 0;
    for (const sample of all(".sample")) {
      sample.hidden = key !== "" && !sample.dataset.classes.split(" ").includes(key);
      shown += !sample.hidden;
      sample.querySelector(".score-title").textContent = `${name} of this image, %`;
      for (const cell of all("dd[data-miou]", sample)) {
        const value = key === "" ? cell.dataset.miou : cell.dataset.iou.split(",")[key];
        cell.textContent = key === "" ? value : value === "" ? "-" : Number(value).toFixed(2);
      }
    }
    byId("no-sample").hidden = shown > 0;
  });
}
if (stages.length) choose();

// Code: a button that copies it. A page from a file has no clipboard in some browsers; then the text is selected.
for (const button of all(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    let outcome = "Copied";
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      outcome = "Selected";
    }
    button.textContent = outcome;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
