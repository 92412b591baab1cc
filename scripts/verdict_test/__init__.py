"""Public test of the verdict on gradient masking: small models whose robust accuracy other attacks have found."""
