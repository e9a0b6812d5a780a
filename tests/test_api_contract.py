"""Every name, argument and override that our code uses of tensorrt, pycuda and cuda.bindings is in the real ones, of each version.

The real bindings come from the package index, without a GPU: TensorRT's load against stub libraries that are compiled here, pycuda's API is
read from its source. What our code uses is read from our code. Downloads are kept under build/api-contract.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Node = dict[str, Any]

# TensorRT of each supported JetPack, and 11. Its wheels are for every Python that copresence knows.
TENSORRT = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.13": "tensorrt-cu13-bindings==10.13.3.9",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
CUDA_BINDINGS = {"12": "cuda-bindings==12.9.*", "13": "cuda-bindings==13.0.*"}
PYCUDA = {"2025.1": "pycuda==2025.1", "2026.1": "pycuda==2026.1"}
LIBRARIES = ("tensorrt", "pycuda", "cuda")

# What the bindings want of libnvinfer, libnvinfer_plugin and libnvonnxparser when they are loaded.
SYMBOLS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParser_INTERNAL
createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getInferLibVersion getNvOnnxParserVersion getPluginRegistry
initLibNvInferPlugins
""".split()

# What Boost.Python's declarations do not tell: which class a function returns.
PYCUDA_RETURNS = {"retain_primary_context": "Context", "mem_alloc": "DeviceAllocation"}


# --- the real ones ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(repository: Path) -> Path:
    folder = repository / "build" / "api-contract" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(cache: Path, requirement: str, *command: str) -> Path:
    """A folder with what pip makes of the requirement, from the cache if it is there; skips only without any network."""
    folder = cache / requirement
    if not folder.is_dir():
        scratch = cache / f"{requirement}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        if not _pip(*command, str(scratch), requirement):
            shutil.rmtree(scratch, ignore_errors=True)
            reachable = _pip("download", "--quiet", "--no-deps", "--dest", str(cache / "reachable"), "packaging")
            if reachable or os.environ.get("CI"):
                pytest.fail(f"{requirement} cannot be had from the package index")
            pytest.skip("the package index cannot be reached")
        scratch.rename(folder)
    return folder


def _pip(*arguments: str) -> bool:
    run = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    sys.stderr.write(run.stderr)
    return run.returncode == 0


def install(cache: Path, requirement: str) -> Path:
    return fetch(cache, requirement, "install", "--quiet", "--only-binary", ":all:", "--no-deps", "--target")


def probe(module: str, paths: list[Path], libraries: Path | None = None) -> Node:
    """The module's API, from a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "LD_LIBRARY_PATH": str(libraries or "")}
    command = [sys.executable, str(Path(__file__).with_name("api_probe.py")), module]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def stubs(cache: Path, major: str) -> Path:
    """Libraries with the names and symbols that the bindings ask for, and nothing in them."""
    folder = cache / f"stubs-{major}"
    folder.mkdir(exist_ok=True)
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = folder / f"lib{name}.so.{major}"
        if not library.exists():
            subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)], check=True)
    return folder


def real_tensorrt(cache: Path, version: str) -> Node:
    if shutil.which("gcc") is None:
        pytest.fail("no gcc for the stub libraries; .ci/packages gcc")
    api = probe("tensorrt_bindings", [install(cache, TENSORRT[version])], stubs(cache, version.split(".", maxsplit=1)[0]))
    assert api["version"].startswith(f"{version}.")
    return api


def real_cuda_bindings(cache: Path, version: str) -> Node:
    return probe("cuda.bindings.driver", [install(cache, CUDA_BINDINGS[version]), install(cache, "cuda-pathfinder")])


def real_pycuda(cache: Path, version: str) -> Node:
    """From the declarations in pycuda's source: it has no wheels, and compiling it needs CUDA."""
    folder = fetch(cache, PYCUDA[version], "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:

        def text(name: str) -> str:
            member = next(m for m in archive if m.name.endswith(name))
            file = archive.extractfile(member)
            assert file is not None
            return file.read().decode()

        source, python = text("src/wrapper/wrap_cudadrv.cpp"), text("pycuda/driver.py")
    assert re.search(r"from pycuda\._driver import \*", python), "pycuda.driver no longer shows all of its C++ part"
    for macro in re.finditer(r"#define (WRAP_\w+)((?:[^\n]*\\\n)+[^\n]*)", source):
        source = source[: macro.end()] + source[macro.end() :].replace(macro[1], macro[2])
    members: dict[str, Node] = {}
    scope: dict[str, Node] = {}
    token = re.compile(
        r'py::class_<[^;]*?\(\s*"(?P<cls>\w+)"|py::enum_<\w+>\("(?P<enum>\w+)"|\.value\("(?P<value>\w+)"|DECLARE_EXC\((?P<exc>\w+)'
        r'|\.def\("(?P<method>\w+)"|\.DEF_SIMPLE_METHOD\((?P<simple>\w+)|\.(?:def_readwrite|add_property)\("(?P<property>\w+)"'
        r'|py::def\("(?P<function>\w+)"|DEF_SIMPLE_FUNCTION(?:_WITH_ARGS)?\((?P<plain>\w+)'
    )
    found = list(token.finditer(source))
    for match, following in zip(found, [*found[1:], None], strict=True):
        body = source[match.end() : following.start() if following else len(source)]
        kind = str(match.lastgroup)
        name = match[kind]
        if kind in ("cls", "enum"):
            scope = {}
            members[name] = {"kind": {"cls": "class"}.get(kind, kind), "members": scope}
            if "py::init<" in body:
                scope["__init__"] = {"kind": "callable", "overloads": _boost(body)}
        elif kind == "exc":
            members[name] = {"kind": "class", "members": {}}
        elif kind in ("value", "property"):
            scope[name] = {"kind": "value", "returns": ""}
        else:
            target = members if kind in ("function", "plain") else scope
            node = {"kind": "callable", "overloads": _boost(body) if kind in ("method", "function") else None}
            for overload in node["overloads"] or []:
                overload["returns"] = PYCUDA_RETURNS.get(name, "")
            if node["overloads"] is None and name in PYCUDA_RETURNS:
                node["returns"] = PYCUDA_RETURNS[name]
            target[name] = node if name not in target else {"kind": "callable", "overloads": None}
    return {"kind": "module", "members": members, "version": version}


def _boost(body: str) -> list[Node] | None:
    """Parameters from py::arg and py::args; null where none are named."""
    params: list[str] = []
    optional = 0
    for match in re.finditer(r"py::args?\(([^)]*)\)(\s*=)?", body):
        names = [name for name in re.findall(r'"(\w+)"', match[1]) if name != "self"]
        params += names
        optional += len(names) if match[2] or "py::optional" in body else 0
    return [{"params": params, "required": len(params) - optional, "returns": ""}] if params else None


# --- what our code uses -------------------------------------------------------------------------------------------


@dataclass
class Use:
    """One attribute, call or override in our source."""

    where: str
    path: str  # such as tensorrt.IExecutionContext.execute_async_v3
    positional: int | None = None  # of a call
    keywords: list[str] = field(default_factory=list)
    overrides: dict[str, list[str]] | None = None  # of a subclass: its methods and their parameters


class Reader:
    """Follows library objects through our modules: imports, assignments, and what the real API says that a call returns.

    In one module a name holds one kind of library object; names of attributes without an underscore hold in all modules.
    """

    def __init__(self, sources: dict[str, str], apis: dict[str, Node]) -> None:
        self.trees = {name: ast.parse(text) for name, text in sources.items()}
        self.apis = apis  # by module path
        self.public: dict[str, str] = {}
        self.errors: list[str] = []
        self.uses: list[Use] = []
        self.resolved: set[int] = set()
        names: dict[str, dict[str, str]] = {name: {} for name in self.trees}
        for _ in range(6):  # as deep as our chains of assignments are
            for name, tree in self.trees.items():
                self._learn(tree, names[name], name)
        for name, tree in self.trees.items():
            self._collect(tree, names[name], name)

    def node(self, path: str) -> Node | None:
        """`module:Class.member` in the real API; a class's members include those of its bases."""
        module, _, rest = path.partition(":")
        node = self.apis.get(module)
        for part in rest.split(".") if rest else ():
            node = None if node is None else node.get("members", {}).get(part)
        return node

    def _learn(self, tree: ast.Module, names: dict[str, str], module: str) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.apis:
                        names[alias.asname or alias.name] = f"{alias.name}:"
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in self.apis:
                        names[alias.asname or alias.name] = f"{node.module}.{alias.name}:"
                    elif alias.name == "import_tensorrt":
                        names["trt"] = "tensorrt:"
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value, names, module)
            elif isinstance(node, ast.ClassDef):
                for base in node.bases:
                    path = self._type(base, names)
                    if path:
                        names[node.name] = path

    def _assign(self, target: ast.expr, value: ast.expr, names: dict[str, str], module: str) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._assign(one, other, names, module)
            return
        path = self._type(value, names)
        key = {ast.Name: "id", ast.Attribute: "attr"}.get(type(target))
        if path is None or key is None:
            return
        name = getattr(target, key)
        key = name if isinstance(target, ast.Name) else f".{name}"
        if names.setdefault(key, path) != path:
            self.errors.append(f"{module}: '{name}' is {names[key]} and {path}; give one of them another name")
        if key.startswith(".") and not name.startswith("_"):
            self.public[key] = path

    def _type(self, node: ast.expr, names: dict[str, str]) -> str | None:
        """Path of a module (`m:`), of a class or function (`m:C`), or of an instance (`m:C` with a `*` in front)."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._type(node.value, names)
            if base is None:
                return names.get(f".{node.attr}") or self.public.get(f".{node.attr}")
            path = self._member(base, node.attr)
            found = self.node(path)
            if found and found["kind"] == "value" and found.get("returns"):
                return self._instance(base, found["returns"])
            return path if found else None
        if isinstance(node, ast.Call):
            path = self._type(node.func, names)
            found = self.node(path.lstrip("*")) if path else None
            if path is None or found is None:
                return None
            if found["kind"] == "class" and not path.startswith("*"):
                return f"*{path}"
            for overload in found.get("overloads") or [found]:
                if overload.get("returns"):
                    return self._instance(path, overload["returns"])
        return None

    def _member(self, base: str, name: str) -> str:
        base = base.lstrip("*")
        return f"{base}{name}" if base.endswith(":") else f"{base}.{name}"

    def _instance(self, path: str, returns: str) -> str | None:
        module = path.lstrip("*").partition(":")[0]
        returns = {"IParserError": "ParserError"}.get(returns, returns)  # 10.x tells the name that it has in C++
        node = self.node(f"{module}:{returns}")
        return f"*{module}:{returns}" if node and node["kind"] == "class" else None

    def _collect(self, tree: ast.Module, names: dict[str, str], module: str) -> None:
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            where = f"{module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                base = self._type(node.value, names)
                if base is not None and self.node(base.lstrip("*")) is not None:
                    self.resolved.add(id(node))
                    self._use(where, self._member(base, node.attr), calls.get(id(node)))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and (path := self._type(node.func, names)):
                if path.startswith("*"):
                    self._use(where, f"{path.lstrip('*')}.__call__", node)
                else:
                    self._use(where, path, node)
            elif isinstance(node, ast.ClassDef) and (path := names.get(node.name)):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                overrides = {m.name: [a.arg for a in m.args.args[1:]] for m in methods}
                self.uses.append(Use(where, path, overrides=overrides))

    def _use(self, where: str, path: str, call: ast.Call | None) -> None:
        if call is None:
            self.uses.append(Use(where, path))
        else:
            starred = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
            assert not starred, f"{where}: arguments of a library call must be spelled out"
            bound = len(call.args) - path.endswith(".__init__")  # called on the class, with self
            self.uses.append(Use(where, path, bound, [str(k.arg) for k in call.keywords]))

    def missed(self) -> list[str]:
        """Attributes that look like the library's, on objects that could not be followed."""
        known = {
            member
            for api in self.apis.values()
            for node in api["members"].values()
            if node["kind"] == "class"
            for member in node["members"]
            if "_" in member.strip("_")
        }
        return [
            f"{name}:{node.lineno} {node.attr}"
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in known and id(node) not in self.resolved
        ]

    def faults(self) -> list[str]:
        """What our code uses and the real API lacks."""
        found = [*self.errors, *(f"{use}: of an object that cannot be followed" for use in self.missed())]
        for use in self.uses:
            node = self.node(use.path)
            if node is None:
                found.append(f"{use.where}: {use.path} does not exist")
            elif use.overrides is not None:
                found += self._override_faults(use, node)
            elif use.positional is not None:
                found += self._call_faults(use, node)
        return found

    def _override_faults(self, use: Use, node: Node) -> list[str]:
        found = []
        for name, member in node["members"].items():
            if member["kind"] == "callable" and not name.startswith("__"):
                wanted = [overload["params"] for overload in member["overloads"]]
                if use.overrides is None or use.overrides.get(name) not in wanted:
                    found.append(f"{use.where}: {use.path}.{name} must be overridden with the parameters {wanted}")
        return found

    def _call_faults(self, use: Use, node: Node) -> list[str]:
        if node["kind"] == "class":
            node = node["members"].get("__init__") or {"overloads": None}
        elif node["kind"] != "callable":
            call = self.node(f"{use.path}.__call__")
            return [] if call else [f"{use.where}: {use.path} cannot be called"]
        choices = node.get("overloads")
        assert use.positional is not None
        for overload in choices or []:
            params = overload["params"]
            given = [*params[: use.positional], *use.keywords]
            fits = use.positional <= len(params) and set(use.keywords) <= set(params[use.positional :])
            if fits and len(given) >= overload["required"]:
                return []
        return [f"{use.where}: {use.path} does not take {use.positional} arguments and {use.keywords}: {choices}"] if choices else []


@pytest.fixture(scope="module")
def sources(repository: Path) -> dict[str, str]:
    """Every module of ours that reaches for one of the libraries."""
    wanted = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(LIBRARIES)})\b|import_tensorrt", re.MULTILINE)
    found = {
        str(path.relative_to(repository)): path.read_text()
        for folder in ("device", "export", "firmware_bridge")
        for path in sorted((repository / folder).rglob("*.py"))
        if wanted.search(path.read_text())
    }
    assert {"device/engine/cuda.py", "device/engine/tensorrt.py"} <= set(found)
    return found


def apis(cache: Path, tensorrt: str = "10.3", pycuda: str = "2026.1", cuda: str = "12") -> dict[str, Node]:
    return {
        "tensorrt": real_tensorrt(cache, tensorrt),
        "pycuda.driver": real_pycuda(cache, pycuda),
        "cuda.bindings.driver": real_cuda_bindings(cache, cuda),
    }


@pytest.mark.parametrize(("tensorrt", "pycuda", "cuda"), [
    ("10.3", "2025.1", "12"), ("10.13", "2026.1", "13"), ("10.16", "2026.1", "13"), ("11.4", "2026.1", "13")
])  # fmt: skip
def test_the_real_libraries_have_what_our_code_uses(tensorrt: str, pycuda: str, cuda: str, sources: dict[str, str], cache: Path) -> None:
    reader = Reader(sources, apis(cache, tensorrt, pycuda, cuda))
    assert reader.faults() == []
    used = {use.path for use in reader.uses}
    assert {
        "tensorrt:Runtime.deserialize_cuda_engine",
        "tensorrt:ICudaEngine.get_tensor_shape",
        "tensorrt:IExecutionContext.execute_async_v3",
        "tensorrt:ILogger",
        "pycuda.driver:memcpy_htod_async",
        "pycuda.driver:Memcpy2D.dst_x_in_bytes",
        "pycuda.driver:Stream.handle",
        "cuda.bindings.driver:cuGraphLaunch",
        "tensorrt:IBuilderConfig.progress_monitor",
        "tensorrt:ParserError.node_operator",
        "tensorrt:IProgressMonitor",
        "tensorrt:IProfiler",
        "tensorrt:IExecutionContext.profiler",
    } <= used, "the reader has lost sight of our code"


@pytest.mark.parametrize(("ours", "spoilt", "said"), [
    ("execute_async_v3(", "execute_async_v2(", "IExecutionContext.execute_async_v2 does not exist"),
    ("trt.TensorIOMode.INPUT", "trt.TensorIOMode.IN", "TensorIOMode.IN does not exist"),
    ("set_tensor_address(name, made.address(name))", "set_tensor_address(name)", "does not take 1 arguments"),
    ("deserialize_cuda_engine(plan)", "deserialize_cuda_engine(engine=plan)", r"does not take 0 arguments and \['engine'\]"),
    ("severity: Any, msg: str", "severity: Any, message: str", "ILogger.log must be overridden"),
    ("context.profiler =", "context.profile =", "IExecutionContext.profile does not exist"),
    ("layer_name: str, ms: float", "name: str, ms: float", "IProfiler.report_layer_time must be overridden"),
    ("driver.Stream(flags=NON_BLOCKING)", "driver.Stream(priority=NON_BLOCKING)", r"does not take 0 arguments and \['priority'\]"),
    ("copy.src_pitch", "copy.source_pitch", "Memcpy2D.source_pitch does not exist"),
    ("graphs.cuGraphInstantiate(graph, 0)", "graphs.cuGraphInstantiate(graph)", "does not take 1 arguments"),
])  # fmt: skip
def test_a_wrong_use_is_found(ours: str, spoilt: str, said: str, sources: dict[str, str], cache: Path) -> None:
    changed = {name: text.replace(ours, spoilt) for name, text in sources.items()}
    assert changed != sources
    faults = Reader(changed, apis(cache)).faults()
    assert any(re.search(said, fault) for fault in faults), faults


# --- the double ---------------------------------------------------------------------------------------------------


def excess(double: Node, real: Node, where: str) -> list[str]:
    """What a double offers and the real one lacks."""
    found = []
    for name, node in double["members"].items():
        path, theirs = f"{where}.{name}", real.get("members", {}).get(name)
        if theirs is None:
            if name not in ("__init__", "__version__"):
                found.append(f"{path} does not exist")
            continue
        if node["kind"] in ("class", "enum"):
            found += excess(node, theirs, path)
        elif node["kind"] == "callable" and theirs.get("overloads") and node["overloads"]:
            params = node["overloads"][0]["params"]
            if not any(params == overload["params"][: len(params)] for overload in theirs["overloads"]) and name != "__init__":
                found.append(f"{path}{params} is not {[overload['params'] for overload in theirs['overloads']]}")
    return found


@pytest.mark.parametrize("version", TENSORRT)
def test_the_double_of_tensorrt_offers_nothing_that_the_real_one_lacks(version: str, cache: Path, repository: Path) -> None:
    double = probe("tensorrt", [repository / "tests" / "doubles"])
    assert "IExecutionContext" in double["members"]
    assert excess(double, real_tensorrt(cache, version), "tensorrt") == []


@pytest.mark.parametrize("version", PYCUDA)
def test_the_double_of_pycuda_offers_nothing_that_the_real_one_lacks(version: str, cache: Path, repository: Path) -> None:
    double = probe("pycuda.driver", [repository / "tests" / "doubles"])
    assert "Memcpy2D" in double["members"]
    assert excess(double, real_pycuda(cache, version), "pycuda.driver") == []


@pytest.mark.parametrize("version", CUDA_BINDINGS)
def test_the_double_of_cuda_bindings_offers_nothing_that_the_real_one_lacks(version: str, cache: Path, repository: Path) -> None:
    double = probe("cuda.bindings.driver", [repository / "tests" / "doubles"])
    assert "cuGraphLaunch" in double["members"]
    assert excess(double, real_cuda_bindings(cache, version), "cuda.bindings.driver") == []
