// Runs before anything is drawn, so that a chosen theme does not flash. "auto" follows the system.
(function () {
  var theme = "auto";
  try {
    theme = localStorage.getItem("kvstore-theme") || "auto";
  } catch (error) {
    theme = "auto";
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
