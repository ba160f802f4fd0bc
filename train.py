"""Train, validate, test or predict: ``python train.py fit --config configs/digits.yaml``."""

from lightning_vae.main import main

if __name__ == "__main__":
    main()
