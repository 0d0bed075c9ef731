// Runs before the first paint, so that a chosen theme never flashes in the other colors.
"use strict";
try {
  const theme = localStorage.getItem("nanochat/theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // storage that is closed leaves the system's theme
}
