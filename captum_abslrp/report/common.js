"use strict";

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

const percent = (share) => `${(100 * share).toFixed(1)}%`;

/** Create the label of a choice: a name, and its probability as a number and a bar, if there is one. */
function labelOf(name, probability = null) {
  if (probability === null) return [name];
  const bar = element("i", { class: "bar" });
  bar.style.setProperty("--share", String(probability));
  return [name, element("small", {}, percent(probability)), bar];
}

/** Create a group of radio buttons; `chosen` is called with the selected index. */
function choices(legend, name, labels, chosen) {
  const buttons = labels.map((label, i) => {
    const input = element("input", { type: "radio", name, value: String(i), checked: i === 0 });
    input.addEventListener("change", () => chosen(i));
    return element("label", { class: "choice" }, input, element("span", {}, ...label));
  });
  return element("fieldset", {}, element("legend", {}, legend), ...buttons);
}

/** Create the images of a map over its picture, and the color scale below. `scale` is the image of the colors. */
function mapOver(picture, size, scale) {
  const overlay = element("img", { class: "overlay", ...size });
  const below = element("img", { ...(picture && { src: picture }), alt: "", class: "below", ...size });
  const missing = element("p", { class: "missing", hidden: true });
  const least = element("span");
  const most = element("span");
  const alt = "Colors from negative relevance (blue) to positive relevance (red)";
  const bar = element("div", { class: "scale" }, least, element("img", { src: scale, alt }), most);
  const stack = element("div", { class: "stack" }, below, overlay, missing);

  /** Show a map (`src`, `alt` and the number `limit` as text), or the reason why there is none. */
  function show(map, reason) {
    overlay.hidden = bar.hidden = !map;
    missing.hidden = Boolean(map);
    missing.textContent = map ? "" : reason;
    if (!map) return;
    overlay.src = map.src;
    overlay.alt = map.alt;
    least.textContent = `\u2212${map.limit}`;
    most.textContent = map.limit;
  }
  return { stack, below, overlay, bar, show };
}

/** Create the slider for the opacity of a map. */
function opacityOf(overlay) {
  const slider = element("input", { type: "range", min: "0", max: "100", value: "100" });
  const shown = element("output", {}, "100%");
  slider.addEventListener("input", () => {
    overlay.style.opacity = String(Number(slider.value) / 100);
    shown.textContent = `${slider.value}%`;
  });
  const label = element("label", { class: "slider" }, "Opacity of the map ", slider, shown);
  return { slider, label };
}

/** While the focus is in a panel, digits select one of its `inputs()`, and + and - change the opacity. */
function listenToKeys(panel, inputs, slider) {
  panel.addEventListener("keydown", (event) => {
    const { tagName, type } = event.target;
    if (event.ctrlKey || event.altKey || event.metaKey || tagName === "SELECT" || type === "text") return;
    const digit = "123456789".indexOf(event.key);
    const all = inputs();
    if (digit >= 0 && digit < all.length) {
      all[digit].click();
      all[digit].focus();
    } else if (event.key === "+" || event.key === "-") {
      slider.value = String(Number(slider.value) + (event.key === "+" ? 10 : -10));
      slider.dispatchEvent(new Event("input"));
    } else return;
    event.preventDefault();
  });
}
