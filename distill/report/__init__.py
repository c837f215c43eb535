"""The page of a run as report.html and report.md, and the page of several runs side by side."""
