"""Networks: backbones (ResNets, MobileNetV2), the DeepLabv3+ decoder, the heads, and the EMA teacher."""
