"use strict";
// Hover, tap or focus shows a cell's likeliest tokens; the arrow keys go from cell to cell.
const found = JSON.parse(document.getElementById("found").textContent);
const detail = document.getElementById("detail");
let chosen = null;

function show(cell) {
  if (chosen) { chosen.classList.remove("chosen"); chosen.tabIndex = -1; }
  chosen = cell;
  cell.classList.add("chosen");
  cell.tabIndex = 0;
  const { title, notes, candidates } = found[cell.dataset.at];
  const list = document.createElement("ol");
  for (const [text, probability] of candidates) {
    const item = document.createElement("li"), token = document.createElement("code");
    const bar = document.createElement("meter"), number = document.createElement("span");
    token.textContent = text;
    bar.value = probability;
    number.textContent = probability.toFixed(4);
    item.append(token, bar, number);
    list.append(item);
  }
  const head = document.createElement("strong"), more = document.createElement("span");
  head.textContent = title;
  more.textContent = " " + notes;
  more.className = "faint";
  detail.replaceChildren(head, more, list);
}

function beside(cell, key) {
  const row = cell.parentElement, column = cell.cellIndex;
  if (key === "ArrowRight") return cell.nextElementSibling;
  if (key === "ArrowLeft") return cell.previousElementSibling;
  if (key === "Home") return row.querySelector("td.cell");
  if (key === "End") return [...row.querySelectorAll("td.cell")].at(-1);
  const other = key === "ArrowDown" ? row.nextElementSibling : key === "ArrowUp" ? row.previousElementSibling : null;
  return other && (other.cells[column] || [...other.querySelectorAll("td.cell")].at(-1));
}

for (const type of ["mouseover", "focusin", "click"])
  document.addEventListener(type, (event) => {
    const cell = event.target.closest?.("td.cell");
    if (cell && cell !== chosen) show(cell);
  });
document.addEventListener("keydown", (event) => {
  const cell = event.target.closest?.("td.cell");
  const next = cell && beside(cell, event.key);
  if (next?.classList.contains("cell")) { next.focus(); event.preventDefault(); }
});
document.getElementById("colours")?.addEventListener("change", (event) => {
  document.body.dataset.colour = event.target.value;  // the shades are in the cells' styles: see page.css
});

for (const table of document.querySelectorAll("table.grid")) {
  const first = table.querySelector("td.cell");
  if (first) first.tabIndex = 0;
}
