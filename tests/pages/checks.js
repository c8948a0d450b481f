// Measures the page it stands in, in a frame, and leaves what it found as JSON in the document around it.
(() => {
  "use strict";
  for (const each of document.querySelectorAll("details")) each.open = true;
  const faults = new Set();
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  // Red, green, blue from 0 to 255 and alpha from 0 to 1 of any CSS colour.
  const parsed = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (front, back) => [0, 1, 2].map((n) => front[n] * front[3] + back[n] * (1 - front[3])).concat([1]);
  const background = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parsed(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((back, front) => over(front, back), [255, 255, 255, 1]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const overlap = (a, b) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;

  const scroller = document.scrollingElement;
  if (scroller.scrollWidth > innerWidth) faults.add(`scrolls sideways: ${scroller.scrollWidth} of ${innerWidth}`);
  for (const element of document.querySelectorAll("[src], link[href], [srcset], [data]"))
    if (!(element.src ?? "").startsWith("data:") && element.id !== "checks") faults.add(`loads ${element.outerHTML.slice(0, 80)}`);
  const loaded = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:"));
  for (const entry of loaded) faults.add(`loads ${entry.name}`);

  let least = 99;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, words = node.data.trim().slice(0, 40);
    if (!words || element.closest("script, style, svg title")) continue;  // a title is shown by the pointer alone
    const style = getComputedStyle(element), isSvg = element instanceof SVGElement;
    const back = background(element);
    const ratio = contrast(over(parsed(isSvg ? style.fill : style.color), back), back);
    least = Math.min(least, ratio);
    if (ratio < 4.5) faults.add(`contrast ${ratio.toFixed(2)} of "${words}"`);
    const range = document.createRange();
    range.selectNodeContents(node);
    const place = range.getBoundingClientRect();
    if (place.width === 0) faults.add(`not shown: "${words}"`);
    const box = element.closest(".scroll, pre");
    if (!box && (place.right > innerWidth + 0.5 || place.left < -0.5)) faults.add(`outside the window: "${words}"`);
    for (let at = element; at && at !== document.body; at = at.parentElement) {
      const shown = getComputedStyle(at);
      const hides = shown.overflowX === "hidden" || shown.overflowX === "clip";
      const edge = at.getBoundingClientRect();
      if (hides && (place.right > edge.right + 1 || place.left < edge.left - 1 || place.bottom > edge.bottom + 1))
        faults.add(`clipped: "${words}" in ${at.tagName}`);
    }
  }
  for (const chart of document.querySelectorAll("svg.chart")) {
    const texts = [...chart.querySelectorAll("text")], places = texts.map((text) => text.getBoundingClientRect());
    places.forEach((place, n) => {
      if (place.height < 8) faults.add(`too small: "${texts[n].textContent}"`);
      for (let other = n + 1; other < places.length; other++)
        if (overlap(place, places[other]))
          faults.add(`"${texts[n].textContent}" lies over "${texts[other].textContent}" in ${chart.ariaLabel}`);
    });
  }
  const cells = [...document.querySelectorAll("th, td")];
  for (const cell of cells) if (cell.scrollWidth > cell.clientWidth + 1) faults.add(`leaves its cell: "${cell.textContent.slice(0, 40)}"`);

  const found = document.createElement("script");
  found.id = "found";
  found.type = "application/json";
  found.textContent = JSON.stringify({
    faults: [...faults], width: innerWidth, height: scroller.scrollHeight, contrast: least,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  }).replaceAll("<", "\\u003c");
  parent.document.body.append(found);
})();
