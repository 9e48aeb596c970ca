"""Tests of albef_core."""
