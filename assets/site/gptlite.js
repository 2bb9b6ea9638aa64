// Small help for readers: folded solutions open on paper, and boxes that scroll can be reached with the keyboard.
(() => {
  "use strict";

  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((box) => { box.open = true; });
  });
  window.addEventListener("afterprint", () => opened.forEach((box) => { box.open = false; }));

  const reachable = () => {
    for (const box of document.querySelectorAll(".bd-article :is(pre, figure.gptlite-figure, .pst-scrollable-table-container, .output.text_html, div.math, mjx-container[display='true'])")) {
      if (box.scrollWidth > box.clientWidth + 1) {
        box.tabIndex = 0;
      } else {
        box.removeAttribute("tabindex");
      }
    }
  };
  window.addEventListener("load", reachable);
  window.addEventListener("resize", reachable);
  document.addEventListener("toggle", reachable, true); // a folded box had no width
})();
