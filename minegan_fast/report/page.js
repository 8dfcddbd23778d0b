"use strict";
const root = document.documentElement;
const number = (value) => (value === null ? "–" : String(Number(value.toPrecision(5))));

const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});

const kept = document.getElementById("grids");
if (kept) {
  const { steps, labels, pictures } = JSON.parse(kept.textContent);
  const slider = document.getElementById("step");
  const shown = document.getElementById("shown");
  const show = () => {
    const step = steps[slider.value];
    shown.src = pictures[step] || document.querySelector(`.grids img[data-step="${step}"]`).src;
    shown.alt = `Images at step ${step}`;
    document.getElementById("shown-step").textContent = `${step}, ${labels[slider.value]}`;
  };
  slider.addEventListener("input", show);
  slider.value = steps.length - 1;
  slider.closest(".slider").hidden = false;
  show();
}

for (const chart of document.querySelectorAll(".chart")) {
  const { steps, x, width, series } = JSON.parse(chart.dataset.points);
  const plot = chart.querySelector(".plot");
  const line = chart.querySelector(".line");
  const values = chart.querySelector(".values");
  let at = steps.length - 1;
  const show = () => {
    line.hidden = false;
    line.style.left = `${(100 * x[at]) / width}%`;
    const said = Object.entries(series).filter(([, row]) => row[at] !== null);
    values.textContent = `step ${steps[at]}: ` + said.map(([name, row]) => `${name} ${number(row[at])}`).join(", ");
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = ((event.clientX - box.left) / box.width) * width;
    at = x.reduce((best, pixel, i) => (Math.abs(pixel - wanted) < Math.abs(x[best] - wanted) ? i : best), 0);
    show();
  });
  plot.addEventListener("pointerleave", () => {
    line.hidden = true;
    values.textContent = "";
  });
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) {
      at = Math.min(Math.max(at + by, 0), steps.length - 1);
      show();
      event.preventDefault();
    }
  });
}

for (const row of document.querySelectorAll("tr.layer")) {
  const { layer, neurons, trained } = row.dataset;
  const stretches = trained.split(",").map((part) => part.split("-").map(Number));
  const cells = row.querySelector("svg");
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect();
    const channel = Math.min(Math.max(Math.floor(((event.clientX - box.left) / box.width) * neurons), 0), neurons - 1);
    const trains = trained && stretches.some(([first, last = first]) => first <= channel && channel <= last);
    document.getElementById("neuron").textContent = `${layer}, channel ${channel}: ${trains ? "trains" : "frozen"}`;
  });
}
