// The page that explains the core shows its code; the reference keeps it folded.
if (location.pathname.endsWith("how_dora_works.html")) {
  document.querySelectorAll("details.mkdocstrings-source").forEach((code) => (code.open = true));
}
