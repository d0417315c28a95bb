// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

// Directory is a directory of manifests for signalbox's --source.
type Directory struct{ Path, staging string }

// NewDirectory makes an empty one in parent.
func NewDirectory(parent string) (*Directory, error) {
	d := &Directory{Path: filepath.Join(parent, "source"), staging: filepath.Join(parent, "staging")}
	for _, path := range []string{d.Path, d.staging} {
		if err := os.Mkdir(path, 0o755); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// Publish makes a file of objects appear whole, or take the place of its former version,
// at one moment.
func (d *Directory) Publish(name string, objects ...runtime.Object) error {
	move, err := d.Prepare(name, objects...)
	if err != nil {
		return err
	}
	return move()
}

// Prepare does all of Publish but its last moment.
func (d *Directory) Prepare(name string, objects ...runtime.Object) (move func() error, err error) {
	text, err := YAML(objects...)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", name, err)
	}
	from := filepath.Join(d.staging, name)
	if err := os.WriteFile(from, text, 0o644); err != nil {
		return nil, err
	}
	return func() error { return os.Rename(from, filepath.Join(d.Path, name)) }, nil
}

// YAML writes objects with their kinds.
func YAML(objects ...runtime.Object) ([]byte, error) {
	var b bytes.Buffer
	for _, o := range objects {
		kinds, _, err := scheme.Scheme.ObjectKinds(o)
		if err != nil {
			return nil, err
		}
		o = o.DeepCopyObject()
		o.GetObjectKind().SetGroupVersionKind(kinds[0])
		text, err := yaml.Marshal(o)
		if err != nil {
			return nil, err
		}
		b.WriteString("---\n")
		b.Write(text)
	}
	return b.Bytes(), nil
}
