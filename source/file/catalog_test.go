// SPDX-License-Identifier: Apache-2.0

package file

import (
	"log/slog"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// An object whose file cannot be read just now is sent later.
func TestUnreadableObjectIsSentLater(t *testing.T) {
	c := newCatalog(slog.New(slog.DiscardHandler))
	web := key{kind: "Service", namespace: "default", name: "web"}
	changed := c.set("a.yaml", map[key]manifest{web: {fingerprint: 1}}, false)
	sink := listener{make(chan string, 10)}
	unsent := c.send(changed, func(string, key) object { return nil }, sink)
	if !slices.Equal(unsent, []key{web}) || len(sink.lines) > 0 {
		t.Fatalf("unsent are %v", unsent)
	}
	obj := &corev1.Service{}
	obj.Name = "web"
	if unsent = c.send(unsent, func(string, key) object { return obj }, sink); len(unsent) > 0 {
		t.Fatalf("unsent are %v", unsent)
	}
	if line := <-sink.lines; line != "apply Service web" {
		t.Errorf("the sink was told %q", line)
	}
}
