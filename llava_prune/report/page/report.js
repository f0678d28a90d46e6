"use strict";

// The theme. It is kept by the page only; the start is what the system asks for.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
  });
  system.addEventListener("change", label);
  label();
  button.hidden = false;
})();

// The table of runs: sorting and filtering of the rows that the page has.
(() => {
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator("en", { numeric: true });

  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };

  // Rows without a number stay last in both directions; equal rows keep their order.
  function sort(column, sign) {
    const keys = new Map(rows.map((row) => [row, value(row, column)]));
    const order = (x, y) => {
      const [a, b] = [keys.get(x), keys.get(y)];
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "number" ? a - b : collator.compare(a, b));
    };
    body.append(...rows.slice().sort(order));
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sort(column, ascending ? 1 : -1);
    });
  });

  const form = document.getElementById("choose");
  const bench = document.getElementById("runs-bench");
  const search = document.getElementById("runs-search");
  const count = document.getElementById("runs-count");
  function filter() {
    const needle = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = (!bench.value || row.dataset.bench === bench.value) && row.textContent.toLowerCase().includes(needle);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown === rows.length ? "" : `${shown} of ${rows.length} runs`;
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  bench.addEventListener("change", filter);
  search.addEventListener("input", filter);
  form.hidden = false;
})();
