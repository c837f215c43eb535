"""The page of a run: its figures as report.html and report.md, and several runs side by side."""
