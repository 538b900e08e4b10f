"""What the tests of several folders are made of: small models, engines, and jobs to run."""
