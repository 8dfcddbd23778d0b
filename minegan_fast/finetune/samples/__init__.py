"""What happens inside `scoring()`: the evidence of every sample of a batch, without a loop over the samples.

A backward pass brings the gradient of a batch, the sum over its samples; Fisher information wants their squares one by
one. So the weights are followed from the parameter to where they meet the samples. There the samples' shares of the
gradient can still be told apart.

    passes.py      the block itself: parameters made trainable, gradients taken and put back, one pass after the other
    following.py   which calls of torch keep the trail of a weight, and which end it
    trail.py       where a followed tensor comes from, so that it can be computed anew
    uses.py        one meeting of a weight and the samples, and the arithmetic of the shares
    buffers.py     the model's buffers, given back where a block has trained it ("movement")

It is used where one backward pass holds several samples. With one sample in each, `scoring(samples=1)`, the gradient is
the sample's own, and nothing is followed. That is how to score where samples act on each other, through statistics of
the batch or a kernel distance: the gradient of such a batch is no sum of what its samples would give alone.
"""
