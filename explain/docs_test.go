// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"signalbox/proxier/plan"
)

// docs/explain.md documents each field of the JSON output, and each reason in it.
func TestSchemaIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../docs/explain.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := func(name string) {
		t.Helper()
		if text := string(page); !strings.Contains(text, "`"+name+"`") && !strings.Contains(text, "`"+name+"[]`") {
			t.Errorf("docs/explain.md does not explain `%s`", name)
		}
	}
	for _, body := range []any{Answer{}, Status{}, Diff{}, TraceLine{}} {
		for _, name := range fields(reflect.TypeOf(body)) {
			documented(name)
		}
	}
	for r := plan.Ready; r < plan.NoService; r++ {
		if r.Text() != "" {
			documented(r.String())
		}
	}
}

// fields returns the names of all JSON fields of a type, and of the types inside.
func fields(t reflect.Type) (names []string) {
	for t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || t.PkgPath() == "time" {
		return nil
	}
	for i := range t.NumField() {
		f := t.Field(i)
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
			names = append(append(names, name), fields(f.Type)...)
		}
	}
	return names
}
