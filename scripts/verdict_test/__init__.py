"""Public test of the verdict on gradient masking: small models whose true robust accuracy is known from other attacks."""
