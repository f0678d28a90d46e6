
// The browser of questions. Texts come from files that anybody may have written: they become text nodes, never markup.
(() => {
  const form = document.getElementById("browse");
  if (!form) return;
  const PAGE = 100;
  const FIRST = 63; // see thumbnails.py
  const [bench, a, b, search, type, show] = ["bench", "a", "b", "search", "type", "show"].map((id) =>
    document.getElementById(id));
  const [totals, found, area] = ["totals", "found", "rows"].map((id) => document.getElementById(id));
  const body = document.getElementById("pairs").tBodies[0];
  const loaded = new Map();
  let data;
  let rows = [];
  let page = 0;

  const number = (n) => n.toLocaleString("en");
  const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

  function element(tag, text, name) {
    const out = document.createElement(tag);
    if (text !== undefined) out.textContent = text;
    if (name) out.className = name;
    return out;
  }

  function options(select, entries, chosen) {
    select.replaceChildren(...entries.map(([value, text]) => {
      const option = element("option", text);
      option.value = value;
      return option;
    }));
    if (chosen !== undefined) select.value = chosen;
  }

  // Data of a benchmark are parsed when it is first chosen.
  function load(index) {
    if (!loaded.has(index)) {
      const fresh = JSON.parse(document.getElementById(`data-${index}`).textContent);
      fresh.lowered = { questions: fresh.questions.map((t) => t.toLowerCase()), texts: fresh.texts.map((t) => t.toLowerCase()) };
      fresh.credit = fresh.runs.some((run) => run.scores.some((s) => s !== null && s !== 0 && s !== 1));
      loaded.set(index, fresh);
    }
    return loaded.get(index);
  }

  // How the scores of a question compare: "a" or "b" for the higher one, or what both have.
  function outcome(i) {
    const [x, y] = [data.runs[a.value].scores[i], data.runs[b.value].scores[i]];
    if (x === null || y === null) return "unscored";
    if (x !== y) return x > y ? "a" : "b";
    return x === 1 ? "both" : x === 0 ? "neither" : "partly";
  }

  const better = () => (data.credit
    ? { a: "higher score in A", b: "higher score in B" }
    : { a: "A right, B wrong", b: "B right, A wrong" });

  const SHOWN = {
    all: () => true,
    flipped: (kind) => kind === "a" || kind === "b",
    a: (kind) => kind === "a",
    b: (kind) => kind === "b",
    both: (kind) => kind === "both",
    neither: (kind) => kind === "neither",
  };

  function chooseBench() {
    data = load(bench.value);
    const runs = data.runs.map((run, i) => [String(i), run.name]);
    const unpruned = Math.max(0, data.runs.findIndex((run) => !run.pruned));
    const pruned = data.runs.findIndex((run, i) => run.pruned && i !== unpruned);
    options(a, runs, String(unpruned));
    options(b, runs, String(pruned < 0 ? Math.min(1, runs.length - 1) : pruned));
    options(type, [["", "all"], ...data.types.map((name, i) => [String(i), name])], "");
    type.closest("label").hidden = data.types.length === 0;
    const { a: onlyA, b: onlyB } = better();
    options(show, [["all", "all, flipped first"], ["flipped", "flipped"], ["a", onlyA], ["b", onlyB],
      ["both", "both right"], ["neither", "both wrong"]], "all");
    search.value = "";
    update();
  }

  function matching() {
    const needle = search.value.trim().toLowerCase();
    const { questions, texts } = data.lowered;
    const hit = needle ? texts.map((text) => text.includes(needle)) : [];
    const [ours, theirs] = [data.runs[a.value].answers, data.runs[b.value].answers];
    const flips = [];
    const others = [];
    for (let i = 0; i < questions.length; i += 1) {
      if (type.value !== "" && data.type[i] !== Number(type.value)) continue;
      const kind = outcome(i);
      if (!SHOWN[show.value](kind)) continue;
      if (needle && !hit[ours[i]] && !hit[theirs[i]] && !questions[i].includes(needle)) continue;
      (SHOWN.flipped(kind) ? flips : others).push(i);
    }
    return [flips, others];
  }

  function update() {
    const [flips, others] = matching();
    rows = [...flips, ...others];
    const all = data.questions.length;
    const what = rows.length === all ? plural(all, "question") : `${number(rows.length)} of ${plural(all, "question")}`;
    found.textContent = `${what}, ${number(flips.length)} flipped`;
    countAll();
    document.getElementById("head-a").textContent = `A: ${data.runs[a.value].name}`;
    document.getElementById("head-b").textContent = `B: ${data.runs[b.value].name}`;
    area.hidden = rows.length === 0;
    turn(0);
  }

  function countAll() {
    const count = { both: 0, a: 0, b: 0, neither: 0, partly: 0, unscored: 0 };
    for (let i = 0; i < data.questions.length; i += 1) count[outcome(i)] += 1;
    const parts = [`${number(count.both)} right in both`, `${number(count.a)} ${better().a}`,
      `${number(count.b)} ${better().b}`, `${number(count.neither)} wrong in both`];
    if (data.credit) parts.push(`${number(count.partly)} with the same partial score`);
    if (count.unscored) parts.push(`${number(count.unscored)} without a score`);
    totals.textContent = `${data.title}: ${parts.join(" \u00b7 ")}.`;
  }

  // The text with what was searched for marked, where lower case has the same length.
  function marked(parent, text) {
    const needle = search.value.trim().toLowerCase();
    const low = text.toLowerCase();
    let at = 0;
    if (needle && low.length === text.length) {
      for (let hit = low.indexOf(needle); hit >= 0; hit = low.indexOf(needle, at)) {
        parent.append(text.slice(at, hit), element("mark", text.slice(hit, hit + needle.length)));
        at = hit + needle.length;
      }
    }
    parent.append(text.slice(at));
    return parent;
  }

  function cell(head, ...content) {
    const out = element("td");
    out.setAttribute("role", "cell");
    if (head) out.dataset.head = head;
    out.append(...content);
    return out;
  }

  function answer(letter, run, i) {
    const score = run.scores[i];
    const name = score === null ? "none" : score === 1 ? "right" : score === 0 ? "wrong" : "part";
    const badge = element("span", score === null ? "\u2013" : String(Number(score.toPrecision(3))), `score ${name}`);
    badge.title = score === null ? "no score" : "score";
    return cell(letter, badge, marked(element("span", "", "answer"), data.texts[run.answers[i]]));
  }

  function row(i) {
    const out = element("tr");
    out.setAttribute("role", "row");
    out.dataset.index = String(i);
    if (SHOWN.flipped(outcome(i))) out.className = "flip";
    const text = marked(element("span", "", "question"), data.questions[i]);
    const question = cell("", text, element("span", String(data.ids[i]), "id"));
    if (data.images && data.images[i]) question.append(opener(out, i));
    const kind = data.type[i] === null ? "" : data.types[data.type[i]];
    out.append(question, cell("Type", kind), answer("A", data.runs[a.value], i), answer("B", data.runs[b.value], i));
    return out;
  }

  // A button that shows the image of a question below its row.
  function opener(parent, i) {
    const button = element("button", "Image");
    button.type = "button";
    button.className = "opener";
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-label", `Image of question ${data.ids[i]}`);
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) parent.nextElementSibling.remove();
      else parent.after(overlays(i));
    });
    return button;
  }

  // The image with the patches that runs A and B keep after a layer, which a slider chooses.
  function overlays(i) {
    const out = element("tr", undefined, "overlays");
    out.setAttribute("role", "row");
    const inside = cell("");
    inside.colSpan = 4;
    const runs = [["A", data.runs[a.value]], ["B", data.runs[b.value]]];
    const views = runs.map(([letter, run]) => drawing(letter, run, i));
    const layers = Math.max(...runs.map(([, run]) => run.layers));
    const slider = element("input");
    Object.assign(slider, { type: "range", min: 0, max: layers - 1, value: layers - 1 });
    const place = element("output");
    const label = element("label", "After decoder layer ");
    label.append(slider, place);
    const show = () => {
      place.textContent = slider.value;
      for (const view of views) view.show(Number(slider.value));
    };
    slider.addEventListener("input", show);
    const both = element("div", undefined, "figures");
    both.append(...views.map((view) => view.figure));
    inside.append(label, both);
    out.append(inside);
    show();
    return out;
  }

  const SVG = "http://www.w3.org/2000/svg";
  let clips = 0;
  function shape(tag, values, ...content) {
    const out = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(values)) out.setAttribute(name, value);
    out.append(...content);
    return out;
  }

  function drawing(letter, run, i) {
    const { source, place } = data.images[i];
    const { width, height, views } = data.places[place];
    const figure = element("figure");
    const caption = element("figcaption");
    const depth = run.patches[i];
    const paths = [];
    const total = views.reduce((sum, view) => sum + view.boxes.length, 0);
    for (const view of views) {
      const [clip, edge] = [shape("path", {}), shape("path", { class: "edge" })];
      const id = `clip-${clips += 1}`;
      paths.push([view, clip, edge]);
      const size = { href: source, width, height };
      figure.append(shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
        "aria-label": `Run ${letter}: dropped patches are dark` },
      shape("clipPath", { id }, clip), shape("image", { ...size, class: "dropped" }),
      shape("image", { ...size, "clip-path": `url(#${id})` }), edge));
    }
    figure.append(caption);
    const show = (layer) => {
      let count = 0;
      for (const [view, clip, edge] of paths) {
        let path = "";
        view.boxes.forEach((box, k) => {
          if (!depth || depth.charCodeAt(view.first + k) - FIRST <= layer) return;
          count += 1;
          if (box) path += `M${box[0]} ${box[1]}H${box[2]}V${box[3]}H${box[0]}Z`;
        });
        clip.setAttribute("d", path);
        edge.setAttribute("d", count < total ? path : ""); // no grid over an unpruned image
      }
      caption.textContent = `${letter}: ${run.name}, ${depth ? `${number(count)} ${count === 1 ? "patch" : "patches"}` : "patches not recorded"}`;
    };
    return { figure, show };
  }

  function turn(to) {
    page = to;
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    const start = page * PAGE;
    body.replaceChildren(...rows.slice(start, start + PAGE).map(row));
    for (const pager of pagers) {
      pager.parts.back.disabled = page === 0;
      pager.parts.next.disabled = page === pages - 1;
      pager.parts.place.textContent = `${number(start + 1)} to ${number(Math.min(start + PAGE, rows.length))} of ${number(rows.length)}`;
      pager.hidden = pages === 1;
    }
  }

  const pagers = [...document.querySelectorAll(".pager")];
  pagers.forEach((pager, index) => {
    const [back, next] = [["Previous", -1], ["Next", 1]].map(([text, step]) => {
      const button = element("button", text);
      button.type = "button";
      button.addEventListener("click", () => {
        turn(page + step);
        if (index) found.scrollIntoView();
        if (button.disabled) (step > 0 ? back : next).focus({ preventScroll: true });
      });
      return button;
    });
    const place = element("span");
    place.setAttribute("role", "status");
    if (index) place.removeAttribute("role");
    pager.parts = { back, next, place };
    pager.append(back, next, place);
  });

  // A run's name in the table of runs chooses it as run B.
  const places = new Map();
  function link() {
    for (const script of document.querySelectorAll("script[id^=data-]")) {
      const index = script.id.slice("data-".length);
      load(index).runs.forEach((run, i) => places.set(run.folder, [index, String(i)]));
    }
  }
  document.getElementById("table").tBodies[0].addEventListener("click", (event) => {
    const name = event.target.closest("th button");
    if (!name) return;
    if (!places.size) link();
    const [index, run] = places.get(name.closest("tr").dataset.folder) || [];
    if (index === undefined) return;
    bench.value = index;
    chooseBench();
    b.value = run;
    update();
    document.getElementById("questions").scrollIntoView();
    b.focus({ preventScroll: true });
  });
  for (const head of document.querySelectorAll("#table tbody th")) {
    const button = element("button", head.textContent);
    button.type = "button";
    button.title = "Show its answers";
    head.replaceChildren(button);
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  bench.addEventListener("change", chooseBench);
  for (const control of [a, b, type, show]) control.addEventListener("change", update);
  search.addEventListener("input", update);
  form.hidden = false;
  chooseBench();
})();
