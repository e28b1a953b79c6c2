"""The command line: ``captum-mipin check | fit | explain | compare``."""
