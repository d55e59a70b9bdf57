"""Networks: ResNet backbones, the DeepLabv3+ decoder, the three heads, and the EMA teacher."""
