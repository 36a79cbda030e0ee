"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf"];
  const BASELINES = ["random", "uniform", "smaller input", "fewer steps"];
  const isBaseline = (method) => BASELINES.includes(method.split(",")[0]);
  const NAMES = {
    method: "method", budget: "budget", top1: "top-1", top1_drop: "top-1 lost", top1_kept: "top-1 kept", knn: "k-NN",
    knn_drop: "k-NN lost", knn_kept: "k-NN kept", agreement: "agreement", cosine: "feature cosine", saliency: "saliency",
    flops_ratio: "FLOPs", tokens: "tokens left", speedup: "speed-up", promised: "promised", control: "A/A'",
    trusted: "quiet", images_per_s: "images/s", note: "note", frechet: "Fréchet distance", frechet_rise: "Fréchet rise",
    accuracy: "digits recognised", accuracy_drop: "recognised less", psnr: "PSNR", recognition: "digits named",
    recognition_drop: "named less", localisation: "digits found", localisation_drop: "found less", steps: "steps",
    decode_speedup: "decoding speed-up", cache_bytes: "cache bytes", vertical: "where kept tokens lie", share: "share kept",
  };
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const drawn = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const number = (value) => (Math.abs(value) < 100 ? value.toFixed(3) : value.toFixed(0));
  const shown = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "boolean") return value ? "yes" : "no";
    return typeof value === "number" && !Number.isInteger(value) ? number(value) : String(value);
  };

  let model, judged, hidden = new Set(), sorting = { column: null, down: true };

  const colourOf = (method) => {
    if (method === "unpatched") return "currentColor";
    if (isBaseline(method)) return "#8a94a3";
    const methods = [...new Set(model.rows.map((row) => row.method))]
      .filter((name) => name !== "unpatched" && !isBaseline(name));
    return COLOURS[methods.indexOf(method) % COLOURS.length];
  };

  function tell(row) {
    const parts = model.columns.filter((name) => !["method", "budget", "note"].includes(name) && row[name] !== null && row[name] !== undefined)
      .map((name) => `${NAMES[name] || name} ${shown(row[name])}`);
    $("point").textContent = `${row.method} ${row.budget}: ${parts.join(", ")}`;
  }

  function plot() {
    const box = { left: 52, right: 12, top: 12, bottom: 40, width: 760, height: 420 };
    const quality = judged.column;
    const rows = model.rows.filter((row) => typeof row[quality] === "number" && typeof row.speedup === "number" && !hidden.has(row.method));
    const holder = $("plot");
    holder.replaceChildren();
    const all = model.rows.filter((row) => typeof row[quality] === "number" && typeof row.speedup === "number");
    if (!all.length) { holder.textContent = "Nothing was measured."; return; }
    const ends = (name) => [
      Math.min(...all.map((row) => row[`${name}_low`] ?? row[name])), Math.max(...all.map((row) => row[`${name}_high`] ?? row[name])),
    ];
    const scale = ([low, high], from, to) => {
      const room = (high - low || 0.1) * 0.05;
      return (value) => from + ((value - low + room) / (high - low + 2 * room || 1)) * (to - from);
    };
    const speeds = ends("speedup"), qualities = ends(quality);
    const x = scale(speeds, box.left, box.width - box.right), y = scale(qualities, box.height - box.bottom, box.top);
    const svg = drawn("svg", { viewBox: `0 0 ${box.width} ${box.height}`, role: "img", "aria-label": `${quality} against measured speed-up` });
    const steps = ([low, high]) => {
      const raw = (high - low || 0.1) / 6, unit = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((times) => times * unit).find((size) => size >= raw);
      const found = [];
      for (let at = Math.ceil(low / step) * step; at <= high + step / 1000; at += step) found.push(at);
      return found;
    };
    const text = (words, attributes) => { const t = drawn("text", attributes); t.textContent = words; svg.append(t); };
    for (const at of steps(speeds)) {
      svg.append(drawn("line", { class: "grid", x1: x(at), x2: x(at), y1: box.top, y2: box.height - box.bottom }));
      text(Number(at.toFixed(3)), { x: x(at), y: box.height - box.bottom + 16, "text-anchor": "middle" });
    }
    for (const at of steps(qualities)) {
      svg.append(drawn("line", { class: "grid", y1: y(at), y2: y(at), x1: box.left, x2: box.width - box.right }));
      text(Number(at.toFixed(3)), { x: box.left - 6, y: y(at) + 4, "text-anchor": "end" });
    }
    text("measured speed-up over the unpatched model", { x: (box.left + box.width) / 2, y: box.height - 8, "text-anchor": "middle" });
    text(judged.name, { x: 4, y: 12 });
    const front = judged.frontier.map((index) => model.rows[index]);
    svg.append(drawn("polyline", {
      points: front.map((row) => `${x(row.speedup)},${y(row[quality])}`).join(" "), fill: "none", stroke: "currentColor",
      "stroke-dasharray": "4 4", opacity: 0.6,
    }));
    for (const method of new Set(rows.map((row) => row.method))) {
      const own = rows.filter((row) => row.method === method).sort((a, b) => a.speedup - b.speedup), colour = colourOf(method);
      svg.append(drawn("polyline", { points: own.map((row) => `${x(row.speedup)},${y(row[quality])}`).join(" "), fill: "none", stroke: colour, opacity: 0.5 }));
      for (const row of own) {
        const [cx, cy] = [x(row.speedup), y(row[quality])];
        const bar = (name, scaled, horizontal) => {
          if (typeof row[`${name}_low`] !== "number") return;
          const [from, to] = [scaled(row[`${name}_low`]), scaled(row[`${name}_high`])];
          svg.append(drawn("line", horizontal ? { x1: from, x2: to, y1: cy, y2: cy, stroke: colour, opacity: 0.4 } : { x1: cx, x2: cx, y1: from, y2: to, stroke: colour, opacity: 0.4 }));
        };
        bar("speedup", x, true);
        bar(quality, y, false);
        const mark = drawn("circle", {
          class: "mark", cx, cy, r: method === "unpatched" ? 8 : 6, stroke: colour, "stroke-width": 2, tabindex: 0,
          fill: row.trusted === false ? "var(--paper)" : colour,
        });
        const title = drawn("title", {});
        title.textContent = `${row.method} ${row.budget}`;
        mark.append(title);
        for (const event of ["pointerenter", "click", "focus"]) mark.addEventListener(event, () => tell(row));
        svg.append(mark);
      }
    }
    const legend = make("ul", { id: "legend" });
    for (const method of new Set(all.map((row) => row.method))) {
      const dot = make("i");
      dot.style.background = colourOf(method);
      const button = make("button", { type: "button", "aria-pressed": String(!hidden.has(method)) }, dot, method);
      button.addEventListener("click", () => { hidden.has(method) ? hidden.delete(method) : hidden.add(method); plot(); });
      legend.append(make("li", {}, button));
    }
    holder.append(svg, legend);
  }

  function table() {
    const rows = [...model.rows];
    const { column, down } = sorting;
    if (column) rows.sort((a, b) => {
      const [left, right] = [a[column], b[column]];
      if (left === right) return 0;
      if (left === null || left === undefined) return 1;
      if (right === null || right === undefined) return -1;
      return (left < right ? -1 : 1) * (down ? -1 : 1);
    });
    const head = make("tr");
    for (const name of model.columns) {
      const button = make("button", { type: "button" }, (NAMES[name] || name) + (column === name ? (down ? " ▾" : " ▴") : ""));
      button.addEventListener("click", () => { sorting = { column: name, down: column === name ? !down : name !== "method" }; table(); });
      head.append(make("th", { scope: "col", "aria-sort": column === name ? (down ? "descending" : "ascending") : "none" }, button));
    }
    const best = new Set(judged.frontier.map((index) => model.rows[index]));
    const body = rows.map((row) => {
      const line = make("tr", best.has(row) ? { class: "best" } : {});
      for (const name of model.columns) {
        const cell = make("td", name === "note" ? { class: "note" } : {}, shown(row[name]));
        if (typeof row[`${name}_low`] === "number") cell.append(make("small", {}, ` [${number(row[`${name}_low`])}, ${number(row[`${name}_high`])}]`));
        line.append(cell);
      }
      return line;
    });
    $("table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
    const quoted = (cell) => (cell === null || cell === undefined ? "" : /[",\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : String(cell));
    const names = [...new Set(model.rows.flatMap((row) => Object.keys(row)))];
    const lines = [names.join(","), ...model.rows.map((row) => names.map((name) => quoted(row[name])).join(","))];
    $("csv").href = `data:text/csv;charset=utf-8,${encodeURIComponent(lines.join("\n") + "\n")}`;
  }

  function choices(arms) {
    const methods = [...new Set(arms.map((arm) => arm.method))];
    const select = make("select", { id: "method" }, ...methods.map((name) => make("option", { value: name }, name)));
    const budget = make("input", { id: "budget", type: "range", min: 0, step: 1, value: 0 }), output = make("output");
    $("controls").append(make("label", {}, "Method ", select), make("label", {}, "Budget ", output, budget));
    const chosen = () => {
      const own = arms.filter((arm) => arm.method === select.value);
      budget.max = own.length - 1;
      const arm = own[Math.min(budget.value, own.length - 1)];
      output.textContent = arm.budget;
      return arm;
    };
    return { controls: [select, budget], chosen };
  }

  function drawings() {
    const holder = $("pictures"), [base, ...arms] = model.drawn;
    $("tokens-title").textContent = "What is drawn from the same noise";
    $("tokens-words").textContent = "Above: the unpatched model. Below: the chosen row, from the same noise.";
    const row = (pictures, words) => make("div", { class: "drawn" }, ...pictures.map((address, index) => make("img", { src: address, alt: `picture ${index + 1}, ${words}` })));
    const { controls, chosen } = choices(arms);
    const draw = () => { const arm = chosen(); holder.replaceChildren(row(base.pictures, "unpatched"), row(arm.pictures, `${arm.method} ${arm.budget}`)); };
    for (const control of controls) control.addEventListener("input", draw);
    draw();
  }

  function tokens() {
    const controls = $("controls"), holder = $("pictures");
    controls.replaceChildren();
    holder.replaceChildren();
    $("tokens").hidden = !model.drawn.length && !model.pictures.length;
    if (model.drawn.length > 1) { drawings(); return; }
    $("tokens-title").textContent = "Which tokens survive";
    $("tokens-words").textContent = "Dropped patches fade. Patches that one token stands for are tinted in one colour.";
    const arms = model.overlays.arms.filter((arm) => arm.places.length);
    if (!arms.length || !model.pictures.length) { holder.textContent = "No method could be drawn here."; return; }
    const { controls: choosing, chosen } = choices(arms);
    const layer = make("input", { id: "layer", type: "range", min: 0, step: 1, value: 1000 }), layerName = make("output");
    controls.append(make("label", {}, "Layer ", layerName, layer));
    const images = model.pictures.map((address) => {
      const canvas = make("canvas", { role: "img" }), image = new Image();
      image.onload = draw;
      image.src = address;
      holder.append(canvas);
      return { canvas, image };
    });
    function draw() {
      const arm = chosen();
      layer.max = arm.places.length - 1;
      const place = arm.places[Math.min(layer.value, arm.places.length - 1)];
      const [rows, columns] = place.grid || model.overlays.grid;
      images.forEach(({ canvas, image }, index) => {
        if (!image.complete || !image.naturalWidth) return;
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        const pen = canvas.getContext("2d"), [wide, high] = [canvas.width / columns, canvas.height / rows], source = place.source[index];
        const count = new Map();
        for (const token of source) if (token >= 0) count.set(token, (count.get(token) || 0) + 1);
        pen.drawImage(image, 0, 0);
        source.forEach((token, patch) => {
          const [left, top] = [(patch % columns) * wide, Math.floor(patch / columns) * high];
          if (token < 0) pen.fillStyle = "rgba(255, 255, 255, .82)";
          else if (count.get(token) > 1) pen.fillStyle = `hsl(${(source.indexOf(token) * 222.5) % 360} 90% 50% / .45)`;
          else return;
          pen.fillRect(left, top, wide, high);
        });
        canvas.setAttribute("aria-label", `picture ${index + 1}: ${count.size} of ${source.length} tokens left`);
        if (index === 0) layerName.textContent = `${place.name}: ${count.size} of ${source.length} tokens left`;
      });
    }
    for (const control of [...choosing, layer]) control.addEventListener("input", draw);
    draw();
  }

  function choose(name) {
    model = data.models.find((one) => one.name === name);
    hidden = new Set();
    sorting = { column: null, down: true };
    const ends = new Set(model.rows.flatMap((row) => Object.keys(row)).filter((key) => /_(low|high)$/.test(key)));
    model.columns = [...new Set(model.rows.flatMap((row) => Object.keys(row)))]
      .filter((key) => !ends.has(key) && model.rows.some((row) => row[key] !== null && row[key] !== undefined && row[key] !== ""));
    for (const button of $("models").children) button.setAttribute("aria-selected", String(button.textContent === name));
    const told = model.environment;
    $("about").textContent = `${name}, ${told.images} images of ${told.data}, batches of ${told.batch}, on ${told.device}`;
    const judges = model.qualities.map((quality) => {
      const button = make("button", { type: "button", role: "tab" }, quality.name);
      button.addEventListener("click", () => judge(quality.column));
      return button;
    });
    $("qualities").replaceChildren(...judges);
    $("qualities").hidden = judges.length < 2;
    $("conditions").replaceChildren(...Object.entries(told).flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, shown(value))]));
    tokens();
    judge(model.qualities[0].column);
  }

  function judge(column) {
    judged = model.qualities.find((quality) => quality.column === column);
    for (const button of $("qualities").children) button.setAttribute("aria-selected", String(button.textContent === judged.name));
    $("advice").replaceChildren(...judged.advice.map((sentence) => make("li", {}, sentence)));
    $("point").textContent = "";
    plot();
    table();
  }

  $("command").textContent = data.command;
  for (const one of data.models) {
    const button = make("button", { type: "button", role: "tab" }, one.name);
    button.addEventListener("click", () => choose(one.name));
    $("models").append(button);
  }
  $("models").hidden = data.models.length < 2;
  choose(data.models[0].name);
})();
