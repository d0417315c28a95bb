// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	sigsyaml "sigs.k8s.io/yaml"
)

// Modes are those that there are manifests for.
var Modes = []string{"nftables", "iptables", "ipvs", "userspace"}

// Kustomize renders the kustomization in a directory.
func Kustomize(dir string) ([]*unstructured.Unstructured, error) {
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return nil, fmt.Errorf("kustomize build %s: %w", dir, err)
	}
	text, err := resources.AsYaml()
	if err != nil {
		return nil, err
	}
	return objects(text)
}

// hookAnnotation marks what helm does not install with the rest.
const hookAnnotation = "helm.sh/hook"

// Helm renders the chart in a directory. Values that its schema refuses are an
// error. hooks are the objects that helm creates at another time, such as for
// `helm test`.
func Helm(dir string, values map[string]any) (installed, hooks []*unstructured.Unstructured, err error) {
	all, err := helm(dir, values)
	for _, o := range all {
		if o.GetAnnotations()[hookAnnotation] != "" {
			hooks = append(hooks, o)
		} else {
			installed = append(installed, o)
		}
	}
	return installed, hooks, err
}

func helm(dir string, values map[string]any) ([]*unstructured.Unstructured, error) {
	chart, err := loader.Load(dir)
	if err != nil {
		return nil, err
	}
	release := common.ReleaseOptions{Name: "signalbox", Namespace: "kube-system", Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(chart, values, release, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(chart, all)
	if err != nil {
		return nil, err
	}
	var out []*unstructured.Unstructured
	for name, text := range files {
		if filepath.Ext(name) != ".yaml" {
			continue
		}
		some, err := objects([]byte(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, some...)
	}
	return out, nil
}

// objects parses the documents of a YAML stream. A key that is there twice is
// an error.
func objects(text []byte) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	docs := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		o := &unstructured.Unstructured{}
		if err := sigsyaml.UnmarshalStrict(doc, &o.Object); err != nil {
			return nil, fmt.Errorf("%w in\n%s", err, doc)
		}
		if len(o.Object) > 0 {
			out = append(out, o)
		}
	}
}
