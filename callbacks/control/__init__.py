"""Write a number of a LightningModule: where it lies, and what it is over the steps."""
