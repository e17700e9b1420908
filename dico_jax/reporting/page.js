"use strict";
(async () => {
  const at = (id) => document.getElementById(id);
  const grids = JSON.parse(at("grids").textContent);
  const shown = new URLSearchParams(location.hash.slice(1));
  const boxes = [...document.querySelectorAll("[data-run]")];
  const names = { step: "steps", images: "images seen", hours: "hours of training" };
  let figures = [], renderers = [];

  // What is chosen stays in the address, so that a page that is loaded again shows the same.
  function keep(name, value) {
    shown.set(name, value);
    history.replaceState(null, "", "#" + shown.toString());
  }

  function smooth(values, weight) {
    let mean = 0, total = 0;
    return Float32Array.from(values, (value) => {
      if (Number.isFinite(value)) {
        mean = weight * mean + (1 - weight) * value;
        total = weight * total + 1 - weight;
      }
      return total > 0 ? mean / total : NaN;
    });
  }

  function drawSmooth() {
    const weight = Number(at("smoothing").value);
    at("smoothing_value").textContent = weight.toFixed(2);
    const sources = new Map();
    for (const [renderer, tags] of renderers) {
      if (tags[0] !== "smooth") continue;
      const source = renderer.data_source, key = tags[3];
      if (!sources.has(source)) sources.set(source, { ...source.data });
      sources.get(source)[key + " smooth"] = smooth(source.data[key], weight);
    }
    for (const [source, data] of sources) source.data = data;
    for (const [renderer, tags] of renderers) {
      if (tags[0] === "smooth") renderer.glyph.y = { field: tags[3] + " smooth" };
    }
  }

  function drawAxis() {
    const axis = at("axis").value;
    for (const [renderer] of renderers) renderer.glyph.x = { field: axis };
    for (const figure of figures) {
      for (const x of figure.below) x.axis_label = names[axis];
      if (figure.x_range.reset) figure.x_range.reset();
    }
    drawVisible();
  }

  function drawVisible() {
    const off = new Set(boxes.filter((box) => !box.checked).map((box) => Number(box.dataset.run)));
    const raw = at("raw").checked, paper = at("paper").checked;
    for (const [renderer, tags] of renderers) {
      const run = tags.indexOf("run");
      renderer.visible = !(run >= 0 && off.has(tags[run + 1])) && (raw || tags[0] !== "raw")
        && (paper || tags[0] !== "paper");
    }
  }

  function paint() {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--fg").trim(), dim = style.getPropertyValue("--dim").trim();
    for (const figure of figures) {
      figure.title.text_color = text;
      for (const axis of [...figure.below, ...figure.left]) {
        axis.axis_label_text_color = axis.major_label_text_color = dim;
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = dim;
      }
    }
  }

  function drawGrid() {
    const steps = [...new Set(grids.flat().map((grid) => grid.step))].sort((a, b) => a - b);
    const slider = at("grid");
    slider.max = steps.length - 1;
    const step = steps[Math.min(Number(slider.value), steps.length - 1)];
    at("grid_value").textContent = step.toLocaleString("en");
    slider.setAttribute("aria-valuetext", "step " + step);
    for (const figure of document.querySelectorAll("[data-grids]")) {
      const run = Number(figure.dataset.grids), found = grids[run].filter((grid) => grid.step <= step);
      const grid = found[found.length - 1], image = figure.querySelector("img");
      const name = document.querySelectorAll(".card h3")[run].textContent;
      figure.hidden = grids[run].length === 0;
      image.hidden = !grid;
      const text = grid ? `${name}, step ${grid.step.toLocaleString("en")}` : `${name}: no grid yet`;
      figure.querySelector("figcaption").textContent = text;
      if (grid) { image.src = grid.src; image.alt = "Samples of " + text; }
    }
    return steps;
  }

  function drawFields() {
    const allowed = { differs: ["differs"], changed: ["differs", "changed"] }[at("fields").value];
    let count = 0;
    for (const row of at("config_table").querySelectorAll("[data-kind]")) {
      row.hidden = Boolean(allowed) && !allowed.includes(row.dataset.kind);
      count += !row.hidden;
    }
    at("fields_count").textContent = count + " fields";
  }

  function drawMetric() {
    for (const table of document.querySelectorAll(".sweep")) {
      table.hidden = table.dataset.metric !== at("metric").value;
    }
  }

  function control(id, event, draw, property = "value") {
    const element = at(id);
    if (!element) return;
    if (shown.has(id)) element[property] = property === "checked" ? shown.get(id) === "true" : shown.get(id);
    element.addEventListener(event, () => { keep(id, element[property]); draw(); });
    draw();
  }

  function start() {
    if (window.Bokeh && Bokeh.documents.length) {
      const models = Bokeh.documents.flatMap((document) => [...document._all_models.values()]);
      figures = models.filter((model) => model.type === "Figure");
      renderers = figures.flatMap((figure) => figure.renderers).map((one) => [one, one.glyph.tags]);
      // The published curves do not make the axes longer.
      const drawn = renderers.filter(([, tags]) => tags.includes("run")).map(([one]) => one);
      for (const figure of figures) figure.x_range.renderers = drawn;
      if (matchMedia("(pointer: fine)").matches) {
        for (const tool of models) if (tool.type === "BoxZoomTool") tool.active = true;
      }
      at("paper_label").hidden = !renderers.some(([, tags]) => tags[0] === "paper");
      for (const box of boxes) {
        const id = "run" + box.dataset.run;
        if (shown.has(id)) box.checked = shown.get(id) === "true";
        box.addEventListener("change", () => { keep(id, box.checked); drawVisible(); });
      }
      control("smoothing", "input", drawSmooth);
      control("raw", "change", drawVisible, "checked");
      control("paper", "change", drawVisible, "checked");
      control("axis", "change", drawAxis);
      paint();
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    }
    document.body.dataset.ready = "true";
  }

  function follow() {
    const stamp = document.body.dataset.stamp, said = at("live");
    async function ask() {
      let text = "";
      try {
        const answer = await (await fetch("stamp", { cache: "no-store" })).json();
        text = answer.said;
        if (answer.stamp !== stamp) {
          sessionStorage.setItem("scroll", String(scrollY));
          location.reload();
          return;
        }
      } catch {
        text = "The server of this page has ended: what is shown stays as it is. Start it again with --live.";
      }
      said.textContent = text;
      said.hidden = !text;
      setTimeout(ask, 3000);
    }
    setTimeout(ask, 3000);
  }

  if (at("grid")) {
    at("grid").max = 1e6;
    at("grid").value = 1e6; // the newest
    control("grid", "input", drawGrid);
  }
  if (at("fields")) control("fields", "change", drawFields);
  if (at("metric")) control("metric", "change", drawMetric);
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
  if (document.body.dataset.stamp) follow();
  const scroll = sessionStorage.getItem("scroll");
  if (at("figures")) {
    const [page, roots] = ["figures", "roots"].map((id) => JSON.parse(at(id).textContent));
    await Bokeh.embed.embed_items({ page }, [{ docid: "page", roots, root_ids: Object.keys(roots) }]);
  }
  start();
  if (scroll !== null && document.body.dataset.stamp) {
    sessionStorage.removeItem("scroll");
    requestAnimationFrame(() => scrollTo(0, Number(scroll)));
  }
})();
