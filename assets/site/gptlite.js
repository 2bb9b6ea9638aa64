// Small help for readers: folded solutions open on paper, boxes that scroll can be reached with the keyboard, and a graph
// opens in place.
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

  // <a class="netron" href="../netron/index.html?url=../graphs/x.onnx">: a click shows Netron under the link's paragraph,
  // a second click takes it away. Without this script, or with Ctrl held, the link is a link.
  const NO_NETRON = location.protocol === "file:"
    ? "Netron needs a page that is served, and this one was opened from a file; `make serve` serves the book. The drawing shows the same graph."
    : "Netron could not be loaded: this copy of the site lacks it, or the network does. The drawing shows the same graph.";

  const isThere = (address) => fetch(address, { method: "HEAD" }).then((answer) => answer.ok, () => false);

  const openGraph = async (link, view) => {
    const app = new URL(link.href);
    const graph = new URL(app.searchParams.get("url"), app);
    const there = await Promise.all([app, graph].map(isThere));
    if (link.getAttribute("aria-expanded") === "false") return; // closed while it was being asked for
    if (there.includes(false)) {
      view.textContent = NO_NETRON;
      return;
    }
    const frame = document.createElement("iframe");
    frame.title = `Netron shows ${graph.pathname.split("/").pop()}`;
    frame.loading = "lazy";
    frame.src = app;
    view.replaceChildren(frame);
  };

  const prepareLinks = () => {
    for (const link of document.querySelectorAll("a.netron")) {
      const view = document.createElement("div");
      view.className = "netron-view";
      view.setAttribute("role", "status"); // what it says is read out
      link.setAttribute("aria-expanded", "false");
      link.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
        event.preventDefault();
        const open = link.getAttribute("aria-expanded") === "false";
        link.setAttribute("aria-expanded", open);
        view.replaceChildren();
        if (open) openGraph(link, view);
      });
      (link.closest("p") ?? link).after(view);
    }
  };
  document.addEventListener("DOMContentLoaded", prepareLinks); // this script stands in the head
})();
