"""Explain the outputs of networks with MIP-IN: which parts of an image determine a logit.

MODEL is one of
  torchvision:NAME        a network of torchvision, such as torchvision:resnet50
  package.module:FACTORY  a function that builds the network; the current folder is searched first
  FILE.pt2                a program by torch.export.save, exported in evaluation mode and with
                          dynamic_shapes=({0: torch.export.Dim("batch")},)

Exit codes: 0 success; 1 failure, with one line on stderr; 2 wrong usage.
Results are printed to stdout, progress to stderr.
"""

# The docstring of this module is the text of --help. Module `arguments` reads the command line,
# `models` and `images` load the network and its images, `main` contains the commands.
