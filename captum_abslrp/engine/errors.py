"""Errors of the engine."""


class UnsupportedCallError(NotImplementedError):
    """A call of the model has no rule. The message names the call, its module and the remedy.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return torch.sinc(x)
        >>> try:
        ...     AbsLRP(Model()).attribute(torch.rand(1, 3), target=0)
        ... except UnsupportedCallError as error:
        ...     print(str(error)[:120])
        Expected every call on the way from the input to the output to have a rule, but got `torch.sinc` in
        the model itself (Mo
    """
