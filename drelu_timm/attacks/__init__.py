"""The attacks: threat models, those that are published, those that know what hides a gradient, and suites of them."""
