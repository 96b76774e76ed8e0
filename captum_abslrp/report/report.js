"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");

/** Create an element with attributes (properties if the value is not a string) and children. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "string") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Split a text at its backticks: every second part is code. */
const marked = (text) => text.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));

const percent = (share) => `${(100 * share).toFixed(1)}%`;

/** Create a group of radio buttons; `chosen` is called with the selected index. */
function choices(legend, name, labels, chosen) {
  const buttons = labels.map((label, i) => {
    const input = element("input", { type: "radio", name, value: String(i), checked: i === 0 });
    input.addEventListener("change", () => chosen(i));
    return element("label", { class: "choice" }, input, element("span", {}, ...label));
  });
  return element("fieldset", {}, element("legend", {}, legend), ...buttons);
}

let count = 0;

function panel(given) {
  const id = `panel${count++}`;
  const has = (view) => given.views.includes(view);
  const comparable = has("difference") ? "difference" : "target";
  const usual = has("difference") ? "difference" : given.views[0];
  const first = given.maps[usual][0] ? usual : given.views.find((view) => given.maps[view][0]) ?? usual;
  const views = [first, ...given.views.filter((view) => view !== first)];
  const state = { class: 0, view: first, rival: null };
  const rival = () => (state.rival === null ? given.contrast : given.classes[state.rival]);

  const [width, height] = given.size;
  const size = { width: String(width), height: String(height) };
  const image = element("img", { src: given.picture, alt: `The picture ${given.name}`, ...size });
  const below = element("img", { src: given.picture, alt: "", class: "below", ...size });
  const overlay = element("img", { class: "overlay", ...size });
  const caption = element("figcaption", { "aria-live": "polite" });
  const least = element("span");
  const most = element("span");
  const scale = element(
    "div",
    { class: "scale" },
    least,
    element("img", { src: data.scale, alt: "Colors from negative relevance (blue) to positive relevance (red)" }),
    most,
  );
  const missing = element("p", { class: "missing", hidden: true }, "This map is not available.");

  /** The selected map and its name. For two classes, it is the difference of their maps. */
  function current() {
    const name = given.classes[state.class];
    const of = (view, i) => given.maps[view][i];
    if (state.view === comparable && state.rival !== null) {
      const pair = given.pairs[`${state.class} ${state.rival}`];
      const how = given.combined === "the difference" ? "" : ", the difference of their maps";
      return [pair, `${name} compared with ${rival()}${how}`];
    }
    if (state.view === "contrast") {
      return [state.rival === null ? of("contrast", state.class) : of("target", state.rival), rival()];
    }
    const names = { target: name, difference: `${name} compared with ${rival()}` };
    return [of(state.view, state.class), names[state.view] ?? `${name}, ${state.view}`];
  }

  function show() {
    const [map, name] = current();
    overlay.hidden = !map;
    missing.hidden = Boolean(map);
    scale.hidden = !map;
    if (map) {
      overlay.src = map.src;
      overlay.alt = map.alt;
      least.textContent = `\u2212${map.limit}`;
      most.textContent = map.limit;
    }
    caption.textContent = name;
    meaning.textContent = meanings()[state.view] ?? "";
    for (const option of against ? against.options : []) {
      option.disabled = option.value !== "" && Number(option.value) === state.class;
    }
  }

  const slider = element("input", { type: "range", min: "0", max: "100", value: "100" });
  const shown = element("output", {}, "100%");
  slider.addEventListener("input", () => {
    overlay.style.opacity = String(Number(slider.value) / 100);
    shown.textContent = `${slider.value}%`;
  });

  const classes = choices(
    given.classes.length > 1 ? "Class" : "Explained",
    `${id}-class`,
    given.classes.map((name, i) => [
      name,
      ...(given.probabilities
        ? [
            element("small", {}, percent(given.probabilities[i])),
            element("i", { class: "bar", style: `--share: ${given.probabilities[i]}` }),
          ]
        : []),
    ]),
    (i) => {
      state.class = i;
      if (state.rival === i) {
        state.rival = null;
        against.value = "";
      }
      show();
    },
  );

  let against = null;
  const pairs = Object.keys(given.pairs).length > 0;
  if (pairs) {
    against = element("select", { id: `${id}-against` });
    against.append(element("option", { value: "" }, has("difference") ? given.contrast : "nothing"));
    given.classes.forEach((name, i) => against.append(element("option", { value: String(i) }, name)));
    against.addEventListener("change", () => {
      state.rival = against.value === "" ? null : Number(against.value);
      if (ofViews) ofViews.querySelectorAll("input")[views.indexOf(comparable)].click();
      show();
    });
  }
  const titles = {
    target: "all relevance for the class",
    contrast: `relevance for ${given.contrast}`,
    difference: "specific to the class",
  };
  const meanings = () => ({
    target: "The relevance for the class, including what it shares with other classes.",
    contrast: "The relevance for what the class is compared with.",
    difference:
      given.combined === "the difference" || state.rival !== null
        ? `Red: more relevance for the class than for ${rival()}. Blue: less.`
        : `The relevance for the class where the class has more of it than ${rival()} (${given.combined}).`,
  });
  const meaning = element("p", { class: "note" });
  const ofViews =
    views.length > 1
      ? choices("Map", `${id}-view`, views.map((view) => [titles[view] ?? view]), (i) => {
          state.view = views[i];
          show();
        })
      : null;

  const stack = element("div", { class: "stack" }, below, overlay, missing);
  const controls = element(
    "div",
    { class: "controls" },
    classes,
    against && element("p", {}, element("label", { for: against.id }, "compared with "), against),
    ofViews,
    ofViews && meaning,
    element("p", {}, element("label", { class: "slider" }, "Opacity of the map ", slider, shown)),
  );
  const article = element(
    "article",
    { class: "panel", tabindex: "-1", "aria-label": given.name },
    element("h3", {}, given.name),
    element(
      "div",
      { class: "pictures" },
      element("figure", {}, image, element("figcaption", {}, "input")),
      element("figure", {}, stack, caption, scale),
      controls,
    ),
    ...given.notes.map((note) => element("p", { class: "note" }, ...marked(note))),
  );

  // While the focus is in the panel, digits select a class, and + and - change the opacity of the map.
  article.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
    const digit = "123456789".indexOf(event.key);
    const inputs = classes.querySelectorAll("input");
    if (digit >= 0 && digit < inputs.length) {
      inputs[digit].click();
      inputs[digit].focus();
    } else if (event.key === "+" || event.key === "-") {
      slider.value = String(Number(slider.value) + (event.key === "+" ? 10 : -10));
      slider.dispatchEvent(new Event("input"));
    } else return;
    event.preventDefault();
  });
  show();
  return article;
}

function table(given) {
  const head = element("tr", {}, ...given.columns.map((name) => element("th", { scope: "col" }, name)));
  const rows = given.rows.map(([first, ...cells]) =>
    element("tr", {}, element("th", { scope: "row" }, first), ...cells.map((cell) => element("td", {}, cell))),
  );
  return element(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": given.caption },
    element(
      "table",
      {},
      element("caption", {}, given.caption),
      element("thead", {}, head),
      element("tbody", {}, ...rows),
    ),
  );
}

for (const section of data.sections) {
  main.append(
    element(
      "section",
      {},
      element("h2", {}, section.title),
      ...section.notes.map((note) => element("p", {}, ...marked(note))),
      ...section.tables.map(table),
      ...section.figures.map((figure) => element("img", { class: "figure", src: figure.src, alt: figure.alt })),
      ...section.panels.map(panel),
    ),
  );
}

const settings = Object.entries(data.settings).flatMap(([name, value]) => [
  element("dt", {}, name),
  element("dd", {}, ...marked(value)),
]);
const keys = [
  element("h2", {}, "Keys"),
  element(
    "p",
    {},
    "Tab moves between controls, and the arrow keys change a selection. In the panel of an image, the keys 1 to 9 select a class, and + and - change the opacity of the map.",
  ),
];
document.querySelector("footer").append(
  element("h2", {}, "How to reproduce this report"),
  ...(data.command ? [element("pre", {}, element("code", {}, data.command))] : []),
  element("dl", {}, ...settings),
  ...(data.sections.some((section) => section.panels.length) ? keys : []),
);
