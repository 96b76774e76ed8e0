const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");

/** Split a text at its backticks: every second part is code. */
const marked = (text) => text.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));

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
  const caption = element("figcaption", { "aria-live": "polite" });
  const map = mapOver(given.picture, size, data.scale);

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
    const [selected, name] = current();
    map.show(selected, "This map is not available.");
    caption.textContent = name;
    meaning.textContent = meanings()[state.view] ?? "";
    for (const option of against ? against.options : []) {
      option.disabled = option.value !== "" && Number(option.value) === state.class;
    }
  }

  const opacity = opacityOf(map.overlay);
  const classes = choices(
    given.classes.length > 1 ? "Class" : "Explained",
    `${id}-class`,
    given.classes.map((name, i) => labelOf(name, given.probabilities && given.probabilities[i])),
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

  const controls = element(
    "div",
    { class: "controls" },
    classes,
    against && element("p", {}, element("label", { for: against.id }, "compared with "), against),
    ofViews,
    ofViews && meaning,
    element("p", {}, opacity.label),
  );
  const article = element(
    "article",
    { class: "panel", tabindex: "-1", "aria-label": given.name },
    element("h3", {}, given.name),
    element(
      "div",
      { class: "pictures" },
      element("figure", {}, image, element("figcaption", {}, "input")),
      element("figure", {}, map.stack, caption, map.bar),
      controls,
    ),
    ...given.notes.map((note) => element("p", { class: "note" }, ...marked(note))),
  );

  listenToKeys(article, () => classes.querySelectorAll("input"), opacity.slider);
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
