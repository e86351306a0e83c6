"use strict";
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const theme = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");
  const name = () => { button.textContent = theme() === "dark" ? "Light colours" : "Dark colours"; };
  dark.addEventListener("change", name);
  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    name();
  });
  name();

  const whole = document.getElementById("whole");
  whole?.addEventListener("click", () => {
    const pressed = document.querySelector(".prototypes").classList.toggle("whole");
    whole.setAttribute("aria-pressed", String(pressed));
  });

  const tip = document.getElementById("tip");
  const hide = () => { tip.style.display = "none"; };
  const show = (_handler, event, _item, value) => {
    if (value === null || value === undefined || typeof value !== "object") { hide(); return; }
    const list = document.createElement("dl");
    for (const [name, text] of Object.entries(value)) {
      const term = document.createElement("dt");
      const detail = document.createElement("dd");
      term.textContent = name;
      detail.textContent = String(text);
      list.append(term, detail);
    }
    tip.replaceChildren(list);
    tip.style.display = "block";
    const { width, height } = tip.getBoundingClientRect();
    const left = event.clientX + 14 + width > window.innerWidth ? event.clientX - width - 14 : event.clientX + 14;
    const top = event.clientY + 14 + height > window.innerHeight ? event.clientY - height - 14 : event.clientY + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  };

  const { config, charts } = JSON.parse(document.getElementById("charts").textContent);
  const options = { mode: "vega-lite", config, renderer: "svg", tooltip: show, actions: false, defaultStyle: false };
  const places = [...document.querySelectorAll("[data-chart]")];
  const draw = async (place) => {
    try {
      await vegaEmbed(place, charts[place.dataset.chart], options);
      place.dataset.drawn = "yes";
    } catch (error) {
      place.classList.add("failed");
      place.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    }
  };
  const rest = async () => {
    for (const place of places) {
      await draw(place);
      await new Promise((next) => { setTimeout(next, 0); });
    }
    root.dataset.ready = performance.now().toFixed(0);
  };
  window.addEventListener("scroll", hide, { passive: true });
  rest();

  const cell = (row, at) => row.cells[at].dataset.value ?? row.cells[at].textContent;
  for (const heading of document.querySelectorAll("th[data-sort]")) {
    const sort = () => {
      const body = heading.closest("table").tBodies[0];
      const down = heading.getAttribute("aria-sort") === "descending";
      for (const other of heading.parentNode.cells) { other.removeAttribute("aria-sort"); }
      heading.setAttribute("aria-sort", down ? "ascending" : "descending");
      const at = heading.cellIndex;
      const text = heading.classList.contains("text");
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [cell(one, at), cell(other, at)];
        const order = text ? a.localeCompare(b, undefined, { numeric: true }) : (parseFloat(a) || 0) - (parseFloat(b) || 0);
        return down ? order : -order;
      });
      body.append(...rows);
    };
    heading.tabIndex = 0;
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", (event) => { if (event.key === "Enter") { sort(); } });
  }
})();
