"""Measuring: rewards on held-out choices, policies on held-out prompts, tables and pictures."""
