"""The private names of PyTorch and Captum that the package uses."""

from __future__ import annotations

PRIVATE_NAMES: dict[str, str] = {
    "torch:_C.DisableTorchFunction": "Code of ours runs without the function mode: find the new context.",
    "torch:_C.DisableTorchFunctionSubclass": "Subclasses count as plain tensors: find the new context.",
    "torch:_C._functorch.maybe_current_level": "Refuse `torch.func` transforms by another test.",
    "torch:_C._functorch.is_functorch_wrapped_tensor": "Refuse `torch.func` transforms by another test.",
    "torch:_C._functorch.get_unwrapped": "Refuse `torch.func` transforms by another test.",
    "torch:_C._disabled_torch_dispatch_impl": "Tell wrapper subclasses by another mark.",
    "torch:_ops.OpOverload": "Name operators of libraries by their new class.",
    "torch:_ops.OpOverloadPacket": "Name operators of libraries by their new class.",
    "torch:_C._storage_Use_Count": "Copy the results of in-place calls.",
    "torch:_C._len_torch_dispatch_stack": "Ask another way whether a dispatch mode is on.",
    "torch:Tensor._is_view": "Tell views by `Tensor._base`.",
    "torch:Tensor._version": "Count in-place changes in the recording alone.",
    "torch:UntypedStorage._cdata": "Tell memory by `data_ptr()`, which is 0 for the meta device.",
    "torch:ops.aten.threshold_backward.grad_input": "Write `torch.where(x > 0, s, 0)`.",
    "torch:ops.aten.hardtanh_backward.grad_input": "Write `torch.where(x < 0, s, 0)`.",
    "torch:ops.aten.convolution_backward": "Use `torch.nn.grad.conv2d_input` and its kin.",
    "torch:ops.aten.gelu_backward": "Write the slope of GELU out.",
    "torch:ops.aten.silu_backward": "Write the slope of SiLU out.",
    "torch:ops.aten.hardswish_backward": "Write the slope of hardswish out.",
    "torch.autograd.function:BackwardCFunction": "Tell nodes of autograd functions by their name.",
    "torch.nn.modules._functions:BackwardHookFunction": "Tell the identity of backward hooks by its name.",
    "torch.nn.modules.module:_global_forward_hooks_with_kwargs": "Remove the mark of a hook no more.",
    "torch.nn.modules.module:_global_backward_hooks": "Ask PyTorch otherwise for hooks of all modules.",
    "torch.nn.modules.module:_global_backward_pre_hooks": "Ask PyTorch otherwise for hooks of all modules.",
    "torch.nn.modules.dropout:_DropoutNd": "List the classes of dropout.",
    "torch.nn.modules.batchnorm:_NormBase": "List the classes of batch norm.",
    "torch.utils._pytree:tree_flatten": "Use the package `optree`, or the walk of `engine.arguments`.",
    "torch.utils._python_dispatch:TorchDispatchMode": "Tell operators of `methods` by hooks of modules.",
    "captum._utils.common:_format_additional_forward_args": "Make a tuple of the arguments.",
    "captum.attr._utils.attribution:GradientAttribution": "Derive from `captum.attr.Attribution`.",
    "captum.attr._utils.lrp_rules:PropagationRule": "Derive rules from Captum's new base class.",
}
"""Replacements for private names, by ``"module:name"``, in case a name is removed. Nodes of the autograd
graph have private attributes as well: ``_input_metadata`` (shapes of the gradients) and
``Function._backward_cls`` (the class of the nodes of this package)."""
