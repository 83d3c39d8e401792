// Before anything is drawn: the theme the reader chose, else the system's.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("jaxllm.theme");
  } catch {
    chosen = null; // storage may be forbidden
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = chosen ?? (dark ? "dark" : "light");
})();
