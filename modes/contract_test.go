// SPDX-License-Identifier: Apache-2.0

package modes

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"signalbox/proxier"
)

// A mode that misspells a method of the contract compiles, because it embeds the
// default. So its types have no exported methods beside those of the contract.
func TestMethodsAreOfTheContract(t *testing.T) {
	contract := map[string]reflect.Type{"Dataplane": reflect.TypeFor[proxier.Mode](), "Proxier": reflect.TypeFor[proxier.Proxier]()}
	for _, m := range All {
		dir := filepath.Join("..", filepath.Base(reflect.TypeOf(m).PkgPath()))
		found := map[string]int{}
		for receiver, method := range methods(t, dir) {
			of := contract[receiver.typ]
			if of == nil || !ast.IsExported(method) {
				continue
			}
			found[receiver.typ]++
			if _, ok := of.MethodByName(method); !ok {
				t.Errorf("%s: %s.%s is not a method of %s", receiver.at, receiver.typ, method, of)
			}
		}
		for name := range contract {
			if found[name] == 0 {
				t.Errorf("%s has no type %s with methods", dir, name)
			}
		}
	}
}

type receiver struct {
	typ string
	at  token.Position
}

// methods lists the methods that the files of a package declare, without tests.
func methods(t *testing.T, dir string) map[receiver]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[receiver]string{}
	set := token.NewFileSet()
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil {
				continue
			}
			typ := fn.Recv.List[0].Type
			if pointer, ok := typ.(*ast.StarExpr); ok {
				typ = pointer.X
			}
			if id, ok := typ.(*ast.Ident); ok {
				found[receiver{id.Name, set.Position(fn.Pos())}] = fn.Name.Name
			}
		}
	}
	return found
}
