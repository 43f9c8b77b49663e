{{/* What the container sees: nothing that it could write to, since connecting to a socket needs no writable folder. */}}
{{- define "zspire.volumeMounts" -}}
- { name: istiod-ca-cert, mountPath: /var/run/secrets/istio, readOnly: true }
- { name: istio-token, mountPath: /var/run/secrets/tokens, readOnly: true }
- { name: cni-ztunnel-sock-dir, mountPath: /var/run/ztunnel, readOnly: true }
{{- if .Values.peerCaCrl.enabled }}
- { name: crl-volume, mountPath: /var/run/secrets/istio-crl, readOnly: true }
{{- end }}
{{- if include "zspire.workloadApi" . }}
- { name: spire-workload-api, mountPath: /run/spire/workload-api, readOnly: true }
{{- end }}
{{- if and (eq .Values.identitySource "spire-broker") (not .Values.spire.broker.address) }}
- { name: spire-broker, mountPath: /run/spire/broker, readOnly: true }
{{- end }}
{{- if eq .Values.identitySource "spire-delegated" }}
- { name: spire-admin, mountPath: /run/spire/admin, readOnly: true }
{{- end }}
{{- with .Values.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "zspire.volumes" -}}
{{- $bundle := include "zspire.shared" (list . "trustBundleName") -}}
- name: istiod-ca-cert
  {{- if eq (get .Values.env "ENABLE_CLUSTER_TRUST_BUNDLE_API" | toString) "true" }}
  projected:
    sources:
      - clusterTrustBundle:
          name: istio.io:istiod-ca:{{ $bundle | default "root-cert" }}
          path: root-cert.pem
  {{- else }}
  configMap: { name: {{ $bundle | default "istio-ca-root-cert" }} }
  {{- end }}
- name: istio-token
  projected:
    sources:
      - serviceAccountToken: { path: istio-token, audience: istio-ca, expirationSeconds: 43200 }
# Not the socket itself: istio-cni makes a new one whenever it starts, and may start later.
- name: cni-ztunnel-sock-dir
  hostPath: { path: /var/run/ztunnel, type: DirectoryOrCreate }
{{- if .Values.peerCaCrl.enabled }}
- name: crl-volume
  configMap: { name: istio-ca-crl, optional: true }
{{- end }}
{{- with .Values.spire }}
{{- if include "zspire.workloadApi" $ }}
- name: spire-workload-api
  {{- if eq .workloadApi.volume "csi" }}
  csi: { driver: {{ .workloadApi.csiDriver | quote }}, readOnly: true }
  {{- else }}
  hostPath: { path: {{ .workloadApi.hostPath | quote }}, type: Directory }
  {{- end }}
{{- end }}
{{- if and (eq $.Values.identitySource "spire-broker") (not .broker.address) }}
- name: spire-broker
  hostPath: { path: {{ .broker.hostPath | quote }}, type: Directory }
{{- end }}
{{- if eq $.Values.identitySource "spire-delegated" }}
- name: spire-admin
  hostPath: { path: {{ .admin.hostPath | quote }}, type: Directory }
{{- end }}
{{- end }}
{{- with .Values.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
