"""What a run came to: figures, one self-contained HTML file, `summary.json` and a README. Plain data in, files out."""
