"""Reproductions: each trains, measures and tabulates one claim."""
