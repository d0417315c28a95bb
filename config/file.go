// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"signalbox/internal/readfile"
	"signalbox/proxier/service"
)

const kind = "KubeProxyConfiguration"

// readFile reads kube-proxy's configuration file, without defaults. ignored names
// unknown and duplicate fields: as with kube-proxy, they are not fatal.
func (f *Flags) readFile() (k *v1alpha1.KubeProxyConfiguration, ignored error, err error) {
	if f.text, err = os.ReadFile(f.file); err != nil {
		return nil, nil, fmt.Errorf("--config=%s: %w", f.file, readfile.Why(err))
	}
	if k, ignored, err = decode(f.text); err != nil {
		return nil, nil, fmt.Errorf("--config=%s: %w", f.file, err)
	}
	return k, ignored, nil
}

func decode(text []byte) (k *v1alpha1.KubeProxyConfiguration, ignored error, err error) {
	if err := checkKind(text); err != nil {
		return nil, nil, err
	}
	_, duplicates := yaml.YAMLToJSONStrict(text)
	asJSON, err := yaml.YAMLToJSON(text)
	if err != nil {
		return nil, nil, err
	}
	k = &v1alpha1.KubeProxyConfiguration{}
	unknown, err := strictjson.UnmarshalStrict(asJSON, k)
	return k, errors.Join(append(unknown, duplicates)...), err
}

// checkKind returns an error if the file has another kind or version.
func checkKind(text []byte) error {
	var head metav1.TypeMeta
	if err := yaml.Unmarshal(text, &head); err != nil {
		return fmt.Errorf("not YAML: %w", err)
	}
	want := v1alpha1.SchemeGroupVersion.String()
	switch {
	case head.APIVersion == "" && head.Kind == "":
		return fmt.Errorf("it has no apiVersion and no kind: it should begin with \"apiVersion: %s\" and \"kind: %s\"", want, kind)
	case head.APIVersion != want || head.Kind != kind:
		return fmt.Errorf("it is a %q of %q, and only a %s of %s is known: give kube-proxy's configuration file", head.Kind, head.APIVersion, kind, want)
	}
	return nil
}

// Write writes a configuration as --config reads it, for --write-config-to.
func Write(path string, k *v1alpha1.KubeProxyConfiguration) error {
	text, err := yaml.Marshal(k)
	if err != nil {
		return fmt.Errorf("writing kube-proxy's configuration: %w", err)
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return fmt.Errorf("--write-config-to: %w; name a file in a directory that is there and can be written", err)
	}
	return nil
}

const (
	healthzPort = 10256
	metricsPort = 10249
	// off in a listen address switches the server off. kube-proxy has no value for
	// this: an empty string means its default.
	off = "0"
)

// setDefaults sets empty fields to the defaults of kube-proxy 1.37. A zero is empty,
// unless the field is a pointer.
func setDefaults(k *v1alpha1.KubeProxyConfiguration) {
	c := &k.ClientConnection
	orElse(&c.ContentType, "application/vnd.kubernetes.protobuf")
	orElse(&c.QPS, 5)
	orElse(&c.Burst, 10)
	logsapi.SetRecommendedLoggingConfiguration(&k.Logging)

	orElse(&k.BindAddress, "0.0.0.0")
	everywhere, loopback := "0.0.0.0", "127.0.0.1"
	if a, ok := service.ParseAddr(k.BindAddress); ok && a.Is6() {
		everywhere, loopback = "::", "::1"
	}
	k.HealthzBindAddress = withPort(cmp.Or(k.HealthzBindAddress, everywhere), healthzPort)
	k.MetricsBindAddress = withPort(cmp.Or(k.MetricsBindAddress, loopback), metricsPort)

	orPointer(&k.IPTables.MasqueradeBit, 14)
	orPointer(&k.IPTables.LocalhostNodePorts, true)
	orElse(&k.IPTables.SyncPeriod.Duration, 30*time.Second)
	orElse(&k.IPTables.MinSyncPeriod.Duration, time.Second)
	orElse(&k.IPVS.SyncPeriod.Duration, 30*time.Second)
	orPointer(&k.NFTables.MasqueradeBit, 14)
	orElse(&k.NFTables.SyncPeriod.Duration, 30*time.Second)
	orElse(&k.NFTables.MinSyncPeriod.Duration, time.Second)

	orPointer(&k.OOMScoreAdj, -999)
	orPointer(&k.Conntrack.MaxPerCore, 32*1024)
	orPointer(&k.Conntrack.Min, 128*1024)
	orPointer(&k.Conntrack.TCPEstablishedTimeout, metav1.Duration{Duration: 24 * time.Hour})
	orPointer(&k.Conntrack.TCPCloseWaitTimeout, metav1.Duration{Duration: time.Hour})
	orElse(&k.ConfigSyncPeriod.Duration, 15*time.Minute)
}

func orElse[T comparable](field *T, value T) { *field = cmp.Or(*field, value) }

func orPointer[T any](field **T, value T) {
	if *field == nil {
		*field = &value
	}
}

// withPort adds a port to an address without one. Other text stays: validation
// reports it.
func withPort(address string, port int32) string {
	if _, ok := service.ParseAddr(address); !ok {
		return address
	}
	return net.JoinHostPort(address, strconv.Itoa(int(port)))
}
