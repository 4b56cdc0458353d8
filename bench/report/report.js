"use strict";
// What can be done in the report: sort tables, switch the budget view, go from a cell to its runs, find a run.
// Without this script everything can be read; the views then stand below each other.

// Sorting: by the number behind a cell. What has none stays last, and a third time brings back the suite's order.

function sortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      body.append(...(next === "none" ? original : sorted(original, column, next === "ascending" ? 1 : -1)));
    });
  });
}

function sorted(rows, column, sign) {
  const key = (row) => {
    const cell = row.cells[column];
    if (cell.dataset.sort === undefined) return cell.textContent;
    return cell.dataset.sort === "" ? null : Number(cell.dataset.sort);
  };
  return [...rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en"));
  });
}

// The three views of equal budgets, as tabs: arrows, Home and End choose, as does a click.

function tabbed(list) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      const is = tab === chosen;
      tab.setAttribute("aria-selected", String(is));
      tab.tabIndex = is ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !is;
    }
  };
  list.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const tab = tabs[(to + tabs.length) % tabs.length];
    choose(tab);
    tab.focus();
  });
  tabs.forEach((tab) => tab.addEventListener("click", () => choose(tab)));
  choose(tabs[0]);
}

// From a cell to the runs behind it: by a list of them, with the command that explains it.

const dialog = document.getElementById("behind");
const known = (run) => document.getElementById(`run-${run}`);

function traceable(cell, table) {
  const runs = cell.dataset.runs.split(" ").filter(known);
  if (!runs.length) return;
  const button = document.createElement("button");
  button.type = "button";
  button.append(...cell.childNodes);
  cell.append(button);
  button.addEventListener("click", () => show(cell, table, runs));
}

function show(cell, table, runs) {
  const row = cell.parentElement.cells[0].textContent;
  const head = table.tHead.rows[0].cells[cell.cellIndex].textContent.replace(/[↓↑†]/g, "").replace(/\s+/g, " ").trim();
  const part = table.id.replace("table-", "");
  document.getElementById("behind-title").textContent = `${row}: ${head}`;
  document.getElementById("behind-value").textContent = `${table.caption.textContent}: ${cell.textContent}`;
  document.getElementById("behind-command").textContent =
    `tsbench explain ${[document.body.dataset.target, part, row, head].map(quoted).join(" ")} ${document.body.dataset.options}`.trim();
  document.getElementById("behind-runs").replaceChildren(...runs.map(linked));
  dialog.showModal();
}

function quoted(word) {
  return /^[\w.\/-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

function linked(run) {
  const item = document.createElement("li");
  const link = document.createElement("a");
  link.href = `#run-${run}`;
  link.textContent = known(run).querySelector(".name").textContent;
  link.addEventListener("click", () => dialog.close()); // also where the address has that run already
  const name = document.createElement("code");
  name.textContent = run;
  item.append(link, " ", name);
  return item;
}

function open() {
  const target = location.hash.startsWith("#run-") && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  dialog.close();
  target.hidden = false;
  target.open = true;
  target.querySelector("summary").focus({ preventScroll: true });
  target.scrollIntoView({ block: "start" });
}

// Finding a run by anything that is on its page.

function findable(field, status) {
  const runs = [...document.querySelectorAll("details.run")];
  const find = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const run of runs) {
      const text = run.textContent.toLowerCase();
      run.hidden = !words.every((word) => text.includes(word));
    }
    status.textContent = words.length ? `${runs.filter((run) => !run.hidden).length} of ${runs.length}` : "";
  };
  field.addEventListener("input", find);
}

for (const table of document.querySelectorAll("table[id^=table-]")) {
  table.querySelectorAll("td[data-runs]").forEach((cell) => traceable(cell, table));
  sortable(table);
}
document.querySelectorAll("[role=tablist]").forEach(tabbed);
findable(document.getElementById("find"), document.getElementById("found"));
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
window.addEventListener("hashchange", open);
open();
