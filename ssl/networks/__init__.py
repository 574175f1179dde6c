"""What a batch goes through: backbones, their weights, timm's networks."""
