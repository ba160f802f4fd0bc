"""Write a number of a LightningModule during training."""
