"""The papers, one file each; no file imports another."""
