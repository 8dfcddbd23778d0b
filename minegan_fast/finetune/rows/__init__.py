"""How some rows of a weight train while the rest of the network stands still.

The selected rows become a leaf of their own, which the optimizer trains (`LeafParameter`). The weight stays where it
is; its class becomes `HeldWeight`, so that it sees every call of torch that it is given to. A `Link` ties the two.

    freezing.py      which weights are held, which rows of them train, and the proof that all others stand still
    link.py          leaf and weight: which was written last, and how the other one follows
    gradient.py      what `weight.grad` shows
    parameters.py    the two classes, and RowWise: what was computed from a weight row by row
    expressions.py   W * c, W.t(), W / sigma: followed until a layer takes them
    layers.py        layers that compute the gradient of the selected rows alone
    ddp.py           DistributedDataParallel is told of the leaves
    containers.py    tensors among nested arguments

Who sees a call of torch first, and what becomes of it:

    who                       when                               what becomes of the call
    Dynamo, torch.jit.trace   the code is traced                 the rows are written into a copy of the weight; Dynamo
                                                                 leaves writes and gradients to Python
    second_order()            a penalty runs a critic; it is a   layers of plain tensors become those of layers/; a
                              TorchFunctionMode                  held weight is not plain, so the call goes on
    Sampled, Derived          inside `scoring()`, where weights  followed to where they meet the samples; the leaves
    (samples/)                are not held                       rest
    HeldWeight                a weight is among the arguments    an attribute, a layer, an expression, or the alias
    RowWise                   the result of an expression is     likewise; a write reaches all that shares its memory
    autocast                  last of all                        layers cast the rows as they would cast the weight
"""
